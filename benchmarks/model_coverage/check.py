"""The check of one type: build it, run it, split it over every mesh, and compare with the model itself."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

import autodist_fx as adx
from autodist_fx.api.compiled_model import CompiledModel
from cost_model.plan.weights import sharded_share
from model_coverage.build import CannotBuild
from model_coverage.decode import Parts, counted, decode_with_cache, eager_decoding
from model_coverage.layers import collectives_per_layer
from model_coverage.results import swept
from model_coverage.subject import SLIGHTLY, Subject, change_by_rounding, is_rounding, make_subject
from model_coverage.sweeps.run import run_sweeps
from model_coverage.tasks import TASKS
from model_coverage.verdict import TOLERANCE, Entry, compare, guarded, mesh_name, tensors

DECODING_MESHES = ((2, 1), (1, 2))
MEASURED_MESH = (2, 1)  # share sharded and collectives per layer are of this one
Mesh = tuple[int, int]


def check_type(
    task: str,
    model_type: str,
    meshes: Sequence[Mesh],
    seconds: float = 60.0,
    so_far: Callable[[dict[str, Any]], None] = lambda partial: None,
    sweeps: Sequence[str] = (),
    sweep_meshes: Sequence[Mesh] = ((2, 1),),
) -> dict[str, Any]:
    """Everything about one type, as plain values. Raises nothing but what kills the process.

    `sweeps` are of SWEEPS, those that the task has, on `sweep_meshes`. `seconds` limits each mesh; `so_far` is told the
    result after each, should the process not live to return it.
    """
    started = time.perf_counter()
    class_name = TASKS[task].types()[model_type]
    result: dict[str, Any] = {"task": task, "type": model_type, "class": class_name, "built": True}
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            subject = make_subject(task, class_name)
            result["dtype"] = str(subject.dtype).removeprefix("torch.")
            result["padded"] = subject.padded
            result["own_plans"] = own_plans(subject.model)
            result["parameters"] = sum(p.numel() for p in subject.model.parameters())
            result["meshes"], result["decoding"] = {}, {}
            for mesh in meshes:
                check = partial(_check_mesh, subject, mesh, result)
                result["meshes"][mesh_name(mesh)] = guarded(check, seconds)
                so_far(result)
            if TASKS[task].decodes:
                _check_decoding(subject, meshes, seconds, result["decoding"])
                so_far(result)
            wanted = [sweep for sweep in sweeps if sweep in TASKS[task].sweeps]
            result["swept"] = swept(sweeps, map(mesh_name, sweep_meshes))
            result["sweeps"] = run_sweeps(task, class_name, subject, wanted, sweep_meshes, seconds) if wanted else {}
    except CannotBuild as error:
        result.update(built=False, reason=str(error))
    result["seconds"] = round(time.perf_counter() - started, 2)
    return result


def own_plans(model: PreTrainedModel) -> list[str]:
    """Returns which plans transformers has for layers of the model: "tp", "pp"."""
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    return [plan for plan in ("tp", "pp") if any(getattr(c, f"base_model_{plan}_plan", None) for c in configs)]


def _check_mesh(subject: Subject, mesh: Mesh, result: dict[str, Any]) -> Entry:
    compiled = adx.compile(subject.model, tp=mesh[0], pp=mesh[1], input_names=tuple(subject.inputs))
    if mesh == MEASURED_MESH:
        result["share_sharded"] = sharded_share(compiled.plan)
        counts = collectives_per_layer(compiled)
        result["all_reduces_per_layer"], result["all_gathers_per_layer"] = counts or (None, None)
    got = tensors(compiled.simulate(**subject.inputs))
    entry = compare(got, subject.expected, TOLERANCE[subject.dtype])
    if entry["verdict"] == "wrong" and is_rounding(subject, compiled, entry):
        return {"verdict": "right", "error": entry["error"], "rounds": True}
    if entry["verdict"] == "wrong":
        entry["reason"] += _why_wrong(subject, compiled, got, entry.get("error", math.inf))
    return entry


def _why_wrong(subject: Subject, compiled: CompiledModel, got: dict[str, torch.Tensor], error: float) -> str:
    """Returns what the model itself does, where that explains it: it is wrong all the same."""
    if "use_cache" in inspect.signature(subject.model.forward).parameters:
        without = tensors(subject.model(**subject.inputs, use_cache=False))
        if compare(got, without, TOLERANCE[subject.dtype])["verdict"] == "right":
            cached = tensors(compiled.simulate(**subject.inputs, use_cache=True))
            same = compare(cached, subject.expected, TOLERANCE[subject.dtype])["verdict"]
            return (
                "; equal to the model called with use_cache=False, which by itself differs from its default, "
                f"use_cache=True; called with that, the split model is {same}, too"
            )
    if error > SLIGHTLY:
        return ""
    change = change_by_rounding(subject)
    return f"; the model's own output changes by {change:.1e} when its weights are rounded to float32"


def _check_decoding(subject: Subject, meshes: Sequence[Mesh], seconds: float, checked: dict[str, Any]) -> None:
    """Fills `checked` per mesh; leaves it empty for a model that has no `past_key_values`."""
    expected = eager_decoding(subject.model, subject.inputs)
    if expected is None:
        return
    for mesh in DECODING_MESHES:
        if mesh in meshes:
            check = partial(_check_decoding_on, subject, mesh, expected)
            checked[mesh_name(mesh)] = guarded(check, seconds)


def _check_decoding_on(subject: Subject, mesh: Mesh, expected: Sequence[Parts]) -> Entry:
    compiled = adx.compile(subject.model, tp=mesh[0], pp=mesh[1], use_cache=True)
    got = decode_with_cache(compiled, subject.model, subject.inputs)
    verdicts = [
        compare(
            {"logits": counted(got, got, subject.inputs)},
            {"logits": counted(truth, got, subject.inputs)},
            TOLERANCE[subject.dtype],
        )
        for truth in expected
    ]
    entry = min(verdicts, key=lambda v: v.get("error", float("inf")))
    if entry["verdict"] == "wrong" and is_rounding(subject, compiled, entry):
        return {"verdict": "right", "error": entry["error"], "rounds": True}
    return entry


__all__ = ["check_type", "own_plans"]
