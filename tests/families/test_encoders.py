"""Encoders of text, on every mesh, give what the model gives on one device: each tensor of the output, in float64."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import PreTrainedModel

import autodist_fx as adx
from tests.support.encoders import ENCODERS, output_error, segments, text_batch, tiny_encoder

MESHES = ((2, 1), (3, 1), (1, 2), (2, 2))


@functools.cache
def _model(class_name: str) -> PreTrainedModel:
    kind, changes = ENCODERS[class_name]
    return tiny_encoder(class_name, kind, **changes)


@pytest.mark.one_for_each("class_name")
@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"{m[0]}x{m[1]}")
@pytest.mark.parametrize("class_name", ENCODERS)
@torch.no_grad()
def test_encoder_equals_eager(class_name: str, mesh: tuple[int, int]) -> None:
    model = _model(class_name)
    inputs = text_batch()
    compiled = adx.compile(model, tp=mesh[0], pp=mesh[1])
    if "token_type_ids" in compiled.program(0).input_names:
        inputs["token_type_ids"] = segments()
    assert output_error(compiled.simulate(**inputs), model(**inputs)) <= 1e-9
    if mesh[0] > 1:
        assert all(p.placement.is_shard for p in compiled.plan.params if p.matmul)


@torch.no_grad()
def test_segments_are_an_input_where_a_model_has_a_table_for_them() -> None:
    names = ("BertForMaskedLM", "RobertaForMaskedLM")
    named = {name: adx.compile(_model(name)).program(0).input_names for name in names}
    assert named == {
        "BertForMaskedLM": ("input_ids", "attention_mask", "token_type_ids"),
        "RobertaForMaskedLM": ("input_ids", "attention_mask"),
    }
    # and may be left out
    model, inputs = _model("BertForMaskedLM"), text_batch()
    assert output_error(adx.compile(model, tp=2).simulate(**inputs), model(**inputs)) <= 1e-9
