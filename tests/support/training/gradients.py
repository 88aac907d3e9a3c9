"""Gradients of all ranks against the model's own."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

import autodist_fx as adx
from autodist_fx.api.compiled_model import CompiledModel
from tests.support.models import padded_batch

Mesh = tuple[int, int]


def eager_gradients(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compiled_for_training(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], mesh: Mesh, **options: Any
) -> CompiledModel:
    return adx.compile(model, tp=mesh[0], pp=mesh[1], train=True, input_names=tuple(inputs), **options)


def gradient_errors(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    largest = max(float(w.abs().max()) for w in wanted.values())
    return {
        name: float((got[name] - w).abs().max()) / max(float(w.abs().max()), 1e-6 * largest)
        for name, w in wanted.items()
    }


def check_gradients(model: PreTrainedModel, inputs: dict[str, torch.Tensor], *meshes: Mesh) -> CompiledModel:
    wanted = eager_gradients(model, inputs)
    for mesh in meshes:
        compiled = compiled_for_training(model, inputs, mesh)
        got = compiled.gradients(**inputs)
        assert list(got) == [name for name, _ in model.named_parameters() if name in got]  # in the model's order
        assert got.keys() >= wanted.keys()
        assert all(not bool(got[name].any()) for name in got.keys() - wanted.keys())  # experts that no token chose
        wrong = {name: error for name, error in gradient_errors(got, wanted).items() if not error <= 1e-9}
        assert not wrong, f"{mesh}: {wrong}"
    return compiled


def batch_of() -> dict[str, torch.Tensor]:
    ids, _ = padded_batch()
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0  # at the end: a row that sees nothing has no gradient to speak of
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
