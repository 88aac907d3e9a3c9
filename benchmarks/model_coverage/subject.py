"""A model that runs by itself, and what it makes of its inputs."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from autodist_fx.api.compiled_model import CompiledModel
from autodist_fx.errors import AutodistError
from model_coverage.build import CannotBuild, build
from model_coverage.decode import forward
from model_coverage.inputs import inputs_for
from model_coverage.verdict import Entry, relative_error, tensors

SLIGHTLY = 1e-4  # an error that float32 may be the reason of, within a model of float64


@dataclass
class Subject:
    """A model that runs, its inputs, and what it makes of them."""

    model: PreTrainedModel
    inputs: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]
    dtype: torch.dtype
    padded: bool


def make_subject(task: str, class_name: str) -> Subject:
    """With padding, in float64 if the model can, else in float32; without padding where it can neither.

    Errors: CannotBuild.
    """
    failure = ""
    for padded in (True, False):
        for dtype in (torch.float64, torch.float32):
            model = build(task, class_name, dtype)
            try:
                inputs = inputs_for(model, task, padded=padded)
                expected = tensors(forward(model, inputs))
            except Exception as error:
                failure = failure or f"the model itself does not run: {type(error).__name__}: {error}"
                continue
            if not expected:
                failure = failure or "the model returns no tensor to compare"
            elif all(bool(value.isfinite().all()) for value in expected.values()):
                return Subject(model, inputs, expected, dtype, padded)
            else:
                failure = failure or "the model's own output is not finite"
    raise CannotBuild(" ".join(failure.split())[:300])


def is_rounding(subject: Subject, compiled: CompiledModel, entry: Entry) -> bool:
    """Returns whether a difference is no larger than what rounding its weights to float32 does to the model itself,
    parts of which compute in float32 whatever its dtype, and all ranks compute what the traced graph does where
    everything is in float64."""
    if not 0.0 < entry.get("error", math.inf) <= min(SLIGHTLY, change_by_rounding(subject)):
        return False
    try:
        compiled.verify_numeric()
    except AutodistError:
        return False
    return True


def change_by_rounding(subject: Subject) -> float:
    """Returns by how much the model's own output changes when its weights are rounded to float32."""
    moved = copy.deepcopy(subject.model)
    for parameter in moved.parameters():
        parameter.copy_(parameter.float())
    own = tensors(forward(moved, subject.inputs))
    return max(relative_error(own[name], value) for name, value in subject.expected.items())


__all__ = ["SLIGHTLY", "Subject", "change_by_rounding", "is_rounding", "make_subject"]
