"""Encoders of images, on every mesh, give what the model gives on one device: each tensor of the output, in float64."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from transformers import PreTrainedModel

import autodist_fx as adx
from tests.support.encoders import VISION, images, output_error, tiny_encoder

MESHES = ((2, 1), (3, 1), (1, 2), (2, 2))


@functools.cache
def _model(class_name: str) -> PreTrainedModel:
    kind, changes = VISION[class_name]
    return tiny_encoder(class_name, kind, **changes)


@pytest.mark.one_for_each("class_name")
@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"{m[0]}x{m[1]}")
@pytest.mark.parametrize("class_name", VISION)
@torch.no_grad()
def test_image_classifier_equals_eager(class_name: str, mesh: tuple[int, int]) -> None:
    model = _model(class_name)
    compiled = adx.compile(model, tp=mesh[0], pp=mesh[1])
    assert compiled.program(0).input_names == ("pixel_values",)
    pixels = images(model.config.image_size)
    assert output_error(compiled.simulate(pixel_values=pixels), model(pixel_values=pixels)) <= 1e-9
    if mesh[0] > 1:
        numbers = {p.name: math.prod(p.shape) for p in compiled.plan.params if p.matmul}
        whole = sum(numbers[p.name] for p in compiled.plan.params if p.matmul and not p.placement.is_shard)
        assert whole <= 0.01 * sum(numbers.values())  # tables of a few rows, read by an index of their own


@torch.no_grad()
def test_any_number_of_images() -> None:
    model = _model("ViTForImageClassification")
    compiled = adx.compile(model, tp=2)
    five = images()[[0, 1, 0, 1, 1]]
    assert output_error(compiled.simulate(pixel_values=five), model(pixel_values=five)) <= 1e-9


@torch.no_grad()
def test_images_of_another_size_are_refused() -> None:
    compiled = adx.compile(_model("ViTForImageClassification"))
    with pytest.raises(adx.AutodistError, match=r"of \[3, 20, 20\] each, .* compiled for \[3, 16, 16\]: resize them"):
        compiled.simulate(pixel_values=images(20))
