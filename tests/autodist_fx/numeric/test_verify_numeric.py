"""verify(numeric=True): what is right passes at true sizes, what is wrong is named; thin factors stand for matrices."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import autodist_fx as adx
from autodist_fx.errors import AutodistError
from autodist_fx.numeric.factored import Factored, draw, sliced
from autodist_fx.tracing import empty_model
from cost_model.errors import VerificationError
from tests.support.encoders import tiny_encoder
from tests.support.models import tiny_config, tiny_model
from tests.support.seq2seq import tiny_seq2seq

GATE = "model.layers.1.mlp.gate_proj.weight"


def _swap_slices(compiled: adx.CompiledModel, name: str, a: int, b: int) -> None:
    mine, yours = compiled.program(a).param_shards, compiled.program(b).param_shards
    first, second = mine[name], yours[name]
    mine[name] = dataclasses.replace(first, intervals=second.intervals)  # type: ignore[index]
    yours[name] = dataclasses.replace(second, intervals=first.intervals)  # type: ignore[index]


@pytest.mark.parametrize("use_cache", [False, True], ids=["forward", "cache"])
def test_right_programs_pass_and_wrong_ones_are_named(use_cache: bool) -> None:
    compiled = adx.compile(tiny_config("llama"), tp=2, pp=2, use_cache=use_cache)  # a config: no weights anywhere
    compiled.verify(numeric=True)
    _swap_slices(compiled, GATE, 2, 3)
    said = r"logits of rank 2 differs .* first to differ is rank 2 .*, model_layers_1_mlp_gate_proj \(Column"
    with pytest.raises(VerificationError, match=said) as caught:
        compiled.verify_numeric()
    (note,) = caught.value.__notes__
    assert len(note.splitlines()) == 11 and "\n> model_layers_1_mlp_gate_proj : " in note


def test_ranks_that_fail_while_running_are_a_verification_error() -> None:
    compiled = adx.compile(tiny_config("gpt2"), tp=2, pp=1)
    graph = compiled.rank(1).graph
    last = next(n for n in reversed(graph.nodes) if getattr(n.target, "__name__", "") == "all_reduce")
    last.replace_all_uses_with(last.args[0])
    graph.erase_node(last)
    with pytest.raises(VerificationError, match=r"run in float64, the ranks fail: \w+Error: "):
        compiled.verify_numeric()


def test_encoders_decoders_and_caches_of_their_own() -> None:
    adx.compile(tiny_encoder("BertForMaskedLM", "bert"), tp=2, pp=2).verify(numeric=True)
    adx.compile(tiny_seq2seq("t5"), tp=2, pp=2, use_cache=True).verify(numeric=True)
    config = AutoConfig.for_model(
        "mamba", hidden_size=32, num_hidden_layers=2, state_size=4, vocab_size=64, time_step_rank=4, conv_kernel=3
    )
    adx.compile(AutoModelForCausalLM.from_config(config).eval(), tp=2, pp=1, use_cache=True).verify(numeric=True)


def test_half_precision_is_checked_in_double() -> None:
    config = tiny_config("qwen3")
    adx.compile(empty_model(config, torch.bfloat16), tp=3, pp=1, use_cache=True).verify(numeric=True)


def test_gradients_that_are_not_added_up() -> None:
    inputs = ("input_ids", "attention_mask", "labels")
    compiled = adx.compile(tiny_model("qwen3"), tp=2, pp=1, train=True, input_names=inputs)
    compiled.verify(numeric=True)
    for rank in range(2):
        graph = compiled.rank(rank).graph
        copy = next(n for n in graph.nodes if getattr(n.target, "__name__", "") == "copy_to_tp")
        copy.replace_all_uses_with(copy.args[0])
        graph.erase_node(copy)
    with pytest.raises(VerificationError, match=r"rank 0 ends with another gradient of model\.embed"):
        compiled.verify_numeric()


# -- factors -----------------------------------------------------------------------------------------------------------


def _large() -> adx.CompiledModel:
    """2 layers of a model whose weights would take a gigabyte in float64."""
    config = AutoConfig.for_model(
        "llama", hidden_size=1536, intermediate_size=4098, num_hidden_layers=2, num_attention_heads=12,
        num_key_value_heads=4, vocab_size=32000,
    )  # fmt: skip
    return adx.compile(empty_model(config, torch.bfloat16), tp=3, pp=2, use_cache=True, cuts=[1])


def test_a_large_model_at_its_true_sizes() -> None:
    compiled = _large()
    compiled.verify(numeric=True)
    _swap_slices(compiled, GATE, 3, 5)
    with pytest.raises(VerificationError, match="logits of rank 3 differs"):
        compiled.verify_numeric()


def test_gradients_of_a_large_model_are_refused_by_name() -> None:
    config = tiny_config("llama", vocab_size=400_000)
    inputs = ("input_ids", "attention_mask", "labels")
    compiled = adx.compile(config, tp=2, pp=1, train=True, input_names=inputs)
    with pytest.raises(AutodistError, match="gradients takes models of up to 16777216 parameters: check a smaller"):
        compiled.verify_numeric()


def _pair(*shape: int) -> tuple[Factored, torch.Tensor]:
    weight = draw(shape, torch.Generator().manual_seed(0))
    return weight, weight.left @ weight.right.mT


def test_factored_weights_are_their_products() -> None:
    torch.manual_seed(0)
    thin, full = _pair(7, 5)
    x, bias, ids = torch.randn(3, 5).double(), torch.randn(7).double(), torch.tensor([[6, 0], [2, 2]])
    assert full.shape == thin.shape and full.var().sqrt() < 1
    torch.testing.assert_close(F.linear(x, thin, bias), F.linear(x, full, bias))
    torch.testing.assert_close(x @ thin.t(), x @ full.t())
    torch.testing.assert_close(F.embedding(ids, thin), F.embedding(ids, full))
    wide = torch.randn(3, 7).double()
    torch.testing.assert_close(torch.addmm(bias[:5], wide, thin), torch.addmm(bias[:5], wide, full))
    torch.testing.assert_close(thin * 2.0, full * 2.0)  # an op without a line: the product
    experts, all_full = _pair(4, 7, 5)
    torch.testing.assert_close(F.linear(x, experts[2]), F.linear(x, all_full[2]))
    torch.testing.assert_close(torch.bmm(wide.expand(4, 3, 7), experts), torch.bmm(wide.expand(4, 3, 7), all_full))


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("intervals", [((1, 3),), ((0, 1), (2, 4)), ()], ids=str)
def test_slices_of_factored_weights(dim: int, intervals: tuple[tuple[int, int], ...]) -> None:
    thin, full = _pair(4, 5, 6)
    part = sliced(thin, dim, intervals)
    assert isinstance(part, Factored)
    torch.testing.assert_close(part.left @ part.right.mT, sliced(full, dim, intervals))
    rows = [i for a, b in intervals for i in range(a, b)]
    torch.testing.assert_close(sliced(full, dim, intervals), full.index_select(dim, torch.tensor(rows).long()))
