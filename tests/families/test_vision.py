"""Encoders of images, on every mesh, give what the model gives on one device: each tensor of the output, in float64."""

from __future__ import annotations

import functools

import pytest
import torch
from tiny_encoders import images, output_error, tiny_encoder
from transformers import PreTrainedModel

import autodist_fx as adx

MESHES = ((2, 1), (3, 1), (1, 2), (2, 2))
VISION = {
    "ViTForImageClassification": ("vit", {}),
    "Dinov2ForImageClassification": ("dinov2", {}),
    "DeiTForImageClassificationWithTeacher": ("deit", {}),
    "BeitForImageClassification": ("beit", {}),
}


@functools.cache
def _model(class_name: str) -> PreTrainedModel:
    kind, changes = VISION[class_name]
    return tiny_encoder(class_name, kind, **changes)


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"{m[0]}x{m[1]}")
@pytest.mark.parametrize("class_name", VISION)
@torch.no_grad()
def test_image_classifier_equals_eager(class_name: str, mesh: tuple[int, int]) -> None:
    model = _model(class_name)
    compiled = adx.compile(model, tp=mesh[0], pp=mesh[1])
    assert compiled.program(0).input_names == ("pixel_values",)
    assert output_error(compiled.simulate(pixel_values=images()), model(pixel_values=images())) <= 1e-9
    if mesh[0] > 1:
        assert all(p.placement.is_shard for p in compiled.plan.params if p.matmul)


@torch.no_grad()
def test_any_number_of_images() -> None:
    model = _model("ViTForImageClassification")
    compiled = adx.compile(model, tp=2)
    five = images()[[0, 1, 0, 1, 1]]
    assert output_error(compiled.simulate(pixel_values=five), model(pixel_values=five)) <= 1e-9
