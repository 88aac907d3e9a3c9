"""Gradients of a split model are those that `model(...).loss.backward()` leaves: in float64, to 1e-9.

Of each parameter, of its own largest element; for one whose gradient is nought but rounding (the bias of the keys: a
softmax does not see it), of a millionth of the largest of all.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import autodist_fx as adx
from autodist_fx.errors import AutodistError, CommunicationError
from tests.support.encoders import text_batch, tiny_encoder
from tests.support.float64 import in_float64
from tests.support.models import tiny_model
from tests.support.seq2seq import seq2seq_inputs, tiny_seq2seq
from tests.support.training.gradients import (
    Mesh,
    batch_of,
    check_gradients,
    compiled_for_training,
    eager_gradients,
    gradient_errors,
)

NINE = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72}
DECODERS: list[tuple[str, dict[str, Any], tuple[Mesh, ...]]] = [
    ("llama", {}, ((3, 1), (1, 2))),
    ("llama", {**NINE, "tie_word_embeddings": True}, ((2, 1), (2, 2))),
    ("llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}, ((4, 1),)),  # biases once
    ("llama", {"num_key_value_heads": 3}, ((4, 1),)),  # a KV head on two ranks
    ("llama", {"num_attention_heads": 10, "num_key_value_heads": 2}, ((3, 1),)),  # a rank with all KV heads
    ("qwen2", {}, ((4, 1),)),
    ("gpt2", {}, ((3, 1), (2, 2))),
    ("opt", {}, ((2, 2),)),
    ("qwen3", {}, ((2, 1), (4, 1))),  # norms of each head's queries and keys
    ("qwen3", {"num_key_value_heads": 1}, ((3, 2),)),
    ("phi3", {}, ((2, 2),)),
    ("phi3", {"num_key_value_heads": 1}, ((4, 1),)),  # fused, and one KV head that every rank has
    ("gemma", {}, ((2, 2),)),
    ("bloom", {}, ((3, 1),)),
]  # fmt: skip


@pytest.mark.drawn(3)
@pytest.mark.parametrize(
    "family, changes, meshes", [pytest.param(*c, id=f"{c[0]}-{'-'.join(map(str, c[1].values()))}") for c in DECODERS]
)
def test_decoders(family: str, changes: dict[str, Any], meshes: tuple[Mesh, ...]) -> None:
    with in_float64():
        check_gradients(tiny_model(family, **changes), batch_of(), *meshes)


def test_a_tied_embedding_is_summed_over_stages_and_a_norm_of_heads_over_tp() -> None:
    with in_float64():
        model, inputs = tiny_model("qwen3", tie_word_embeddings=True), batch_of()
        compiled = check_gradients(model, inputs, (2, 2))
    owed = {s.source: s.ranks for rank in range(4) for s in compiled.program(rank).grad_sums or ()}
    assert owed == {
        "model.embed_tokens.weight": (1, 3),  # the last of two shards
        **{f"model.layers.0.self_attn.{n}_norm.weight": (0, 1) for n in "qk"},
        **{f"model.layers.1.self_attn.{n}_norm.weight": (2, 3) for n in "qk"},
    }


def test_an_encoder() -> None:
    with in_float64():
        inputs = text_batch()
        inputs["labels"] = inputs["input_ids"]
        check_gradients(tiny_encoder("BertForMaskedLM", "bert"), inputs, (2, 1), (2, 2))


def test_an_encoder_decoder() -> None:
    with in_float64():
        model = tiny_seq2seq("t5")
        given = {name: x for name, x in seq2seq_inputs(model).items() if not name.startswith("decoder")}
        check_gradients(model, {**given, "labels": torch.randint(3, 128, (2, 7))}, (2, 2))


# -- what the check can tell -------------------------------------------------------------------------------------------


def test_without_its_sum_a_norm_of_heads_differs_between_ranks() -> None:
    with in_float64():
        model, inputs = tiny_model("qwen3"), batch_of()
        compiled = compiled_for_training(model, inputs, (2, 1))
        for rank in range(2):
            compiled.program(rank).grad_sums = ()
        with pytest.raises(CommunicationError, match=r"gradient of .*_norm.weight is another one on rank 1 than on"):
            compiled.gradients(**inputs)


def test_frozen_parameters_get_no_gradient_and_the_model_stays_as_it_is() -> None:
    with in_float64():
        model, inputs = tiny_model("llama"), batch_of()
        model.model.embed_tokens.weight.requires_grad_(False)
        wanted = eager_gradients(model, inputs)
        model.zero_grad()
        got = compiled_for_training(model, inputs, (2, 2)).gradients(**inputs)
        assert got.keys() == wanted.keys() and "model.embed_tokens.weight" not in got
        assert max(gradient_errors(got, wanted).values()) <= 1e-9
        assert all(p.grad is None for p in model.parameters())


def test_inputs_without_labels_and_programs_for_inference() -> None:
    model, inputs = tiny_model("gpt2"), batch_of()
    with pytest.raises(AutodistError, match="returned no loss: pass what it computes one from"):
        adx.compile(model, tp=2, train=True).gradients(input_ids=inputs["input_ids"])
    with pytest.raises(AutodistError, match="compile with train=True"):
        adx.compile(model, tp=2).gradients(**inputs)


@torch.no_grad()
def test_training_programs_compute_what_the_model_does() -> None:
    model, inputs = tiny_model("gpt2"), batch_of()
    found = compiled_for_training(model, inputs, (2, 2)).simulate(**inputs)
    torch.testing.assert_close(found.loss, model(**inputs).loss, rtol=1e-9, atol=0)
