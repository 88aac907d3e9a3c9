"""The tests of lesson 4. The truth is transformers' own LlamaForCausalLM, in eager torch."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch

from autodist_fx.course.grading import Check
from autodist_fx.course.models import tiny_llama
from autodist_fx.course.ranks import messages, on_ranks

ROLES = {
    "column": ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
    "row": ("o_proj", "down_proj"),
    "whole": ("input_layernorm", "act_fn", "rotary_emb"),
}
TOLERANCE = 1e-6  # relative: Llama's norms compute in float32, whatever the model's dtype


def roles(answer: Any) -> None:
    for wanted, names in ROLES.items():
        for name in names:
            assert answer.role(name) == wanted, f"role({name!r}) is {answer.role(name)!r}, and not {wanted!r}"


def heads(answer: Any) -> None:
    for queries, keys, tp in ((4, 2, 2), (9, 3, 2), (6, 6, 3), (8, 2, 1)):
        config = SimpleNamespace(num_attention_heads=queries, num_key_value_heads=keys, head_dim=8)
        parts = [answer.head_slices(config, rank, tp) for rank in range(tp)]
        said = f"with {queries} heads and {keys} KV heads on {tp} ranks"
        for which, number in ((0, queries), (1, keys)):
            rows = [list(range(8 * number))[part[which]] for part in parts]
            name = ("q_proj", "k_proj")[which]
            once = [row for own in rows for row in own] == list(range(8 * number))
            assert once, f"{said}, {name}'s rows are not each once"
            assert all(len(own) % 8 == 0 for own in rows), f"{said}, {name} is cut inside a head"
        for rank, (of_queries, of_keys) in enumerate(parts):
            read = {head // (queries // keys) for head in range(of_queries.start // 8, of_queries.stop // 8)}
            there = set(range(of_keys.start // 8, of_keys.stop // 8))
            assert read == there, f"{said}, rank {rank}'s query heads read the keys {read}, and it has {there}"


def _ids() -> torch.Tensor:
    return torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(3))


def _assert_same_logits(answer: Any, tp: int, **shape: int) -> None:
    with torch.no_grad():
        wanted = tiny_llama(**shape)(_ids()).logits
        got = on_ranks(lambda rank: answer.parallelize(tiny_llama(**shape), rank, tp)(_ids()).logits, tp=tp)
    for rank, logits in enumerate(got):
        error = float((logits - wanted).abs().max() / wanted.abs().max())
        assert error < TOLERANCE, f"rank {rank} of {tp}: logits differ by {error:.2g} of the largest"


def same_logits(answer: Any) -> None:
    _assert_same_logits(answer, 2, heads=4, kv_heads=2)


def uneven_heads(answer: Any) -> None:
    _assert_same_logits(answer, 2, heads=9, kv_heads=3, layers=1)


def two_sums(answer: Any) -> None:
    with torch.no_grad():
        said = messages(lambda rank: answer.parallelize(tiny_llama(), rank, 2)(_ids()), tp=2)
    wanted = Counter({"all_reduce of float64[2, 7, 32]": 4})
    assert said[0] == wanted, f"2 layers take {dict(said[0])}, and {dict(wanted)} would do: two sums a layer"


def half_the_weights(answer: Any) -> None:
    whole, parts = tiny_llama(layers=1), [answer.parallelize(tiny_llama(layers=1), rank, 2) for rank in range(2)]
    for name in (*ROLES["column"], *ROLES["row"]):
        all_of_it, *held = (
            next(p.untyped_storage().nbytes() for path, p in model.named_parameters() if f".{name}.weight" in path)
            for model in (whole, *parts)
        )
        assert sum(held) == all_of_it and held[0] == held[1], f"of {name}'s {all_of_it} bytes the ranks hold {held}"


CHECKS = (
    Check("each linear has the role that it should have", roles),
    Check("no head is cut, and queries are where their keys are", heads),
    Check("two ranks give the logits of transformers' Llama, both of them", same_logits),
    Check("9 heads and 3 KV heads on two ranks do, too", uneven_heads),
    Check("a layer takes two all_reduces, and nothing else", two_sums),
    Check("each rank holds half of each linear", half_the_weights),
)
