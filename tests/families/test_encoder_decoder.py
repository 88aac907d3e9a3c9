"""Encoder-decoder models, text and speech: every mesh gives what the model gives on one device, in float64."""

from __future__ import annotations

import functools

import pytest
import torch
from tiny_models import relative_error
from tiny_seq2seq import seq2seq_inputs, tiny_seq2seq
from transformers import PreTrainedModel

import autodist_fx as adx
from autodist_fx.tracing import empty_model

FAMILIES = ("t5", "bart", "m2m_100", "whisper")
TOLERANCE = {"t5": 1e-6}  # of float64: its norms and softmaxes cast to float32
MESHES = ((2, 1), (3, 1), (1, 2), (2, 2))


@functools.cache
def _model(family: str) -> PreTrainedModel:
    return tiny_seq2seq(family)


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"{m[0]}x{m[1]}")
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_forward_equals_eager(family: str, mesh: tuple[int, int]) -> None:
    model = _model(family)
    compiled = adx.compile(model, tp=mesh[0], pp=mesh[1])
    inputs = seq2seq_inputs(model)
    assert inputs.keys() <= set(compiled.program(0).input_names)
    got = compiled.simulate(**inputs)
    expected = model(**inputs, use_cache=False)
    assert relative_error(got.logits, expected.logits) <= TOLERANCE.get(family, 1e-9)
    last = expected.encoder_last_hidden_state
    assert relative_error(got.encoder_last_hidden_state, last) <= TOLERANCE.get(family, 1e-9)
    if mesh[0] > 1:
        weights = [p for p in compiled.plan.params if p.matmul]
        assert all(p.placement.is_shard for p in weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_sums_an_encoder_layer_and_three_a_decoder_layer(family: str) -> None:
    """Counted as what two more layers of each cost: embeddings and the head have sums of their own."""
    counts = []
    for layers in (1, 3):
        compiled = adx.compile(tiny_seq2seq(family, layers=layers).config, tp=2)
        assert type(empty_model(_model(family).config)) is type(_model(family))
        counts.append(sum(count for name, count, _ in compiled.plan.stages[0].collectives if name == "all_reduce"))
    assert counts[1] - counts[0] == 2 * (2 + 3)


def test_shared_embeddings_live_on_every_stage_that_reads_them() -> None:
    """Encoder, decoder and head have one table."""
    compiled = adx.compile(_model("t5").config, pp=2)
    (table,) = (p for p in compiled.plan.params if p.name == "shared.weight")
    assert table.stages == (0, 1)
