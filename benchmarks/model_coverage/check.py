"""The check of one type: build it, run it, split it over every mesh, and compare with the model itself."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import autodist_fx as adx
from autodist_fx.api.compiled_model import CompiledModel
from autodist_fx.errors import AutodistError
from cost_model.plan.weights import sharded_share
from model_coverage.build import CannotBuild, build
from model_coverage.decode import Parts, counted, decode_with_cache, eager_decoding, forward
from model_coverage.inputs import inputs_for
from model_coverage.layers import collectives_per_layer
from model_coverage.tasks import TASKS

# Relative to the largest value of the output. Many models compute norms and rotary tables in float32 whatever their
# dtype, so that a last bit of float64 can become a last bit of float32 (6e-8).
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
DECODING_MESHES = ((2, 1), (1, 2))
MEASURED_MESH = (2, 1)  # share sharded and collectives per layer are of this one
Mesh = tuple[int, int]


@dataclass
class Subject:
    """A model that runs, its inputs, and what it makes of them."""

    model: PreTrainedModel
    inputs: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]
    dtype: torch.dtype
    padded: bool


def check_type(
    task: str,
    model_type: str,
    meshes: Sequence[Mesh],
    seconds: float = 60.0,
    so_far: Callable[[dict[str, Any]], None] = lambda partial: None,
) -> dict[str, Any]:
    """Everything about one type, as plain values. Raises nothing but what kills the process.

    `seconds` limits each mesh; `so_far` is told the result after each, should the process not live to return it.
    """
    started = time.perf_counter()
    class_name = TASKS[task].types()[model_type]
    result: dict[str, Any] = {"task": task, "type": model_type, "class": class_name, "built": True}
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            subject = _subject(task, class_name)
            result["dtype"] = str(subject.dtype).removeprefix("torch.")
            result["padded"] = subject.padded
            result["own_plans"] = own_plans(subject.model)
            result["parameters"] = sum(p.numel() for p in subject.model.parameters())
            result["meshes"], result["decoding"] = {}, {}
            for mesh in meshes:
                check = partial(_check_mesh, subject, mesh, result)
                result["meshes"][mesh_name(mesh)] = _guarded(check, seconds)
                so_far(result)
            if TASKS[task].decodes:
                _check_decoding(subject, meshes, seconds, result["decoding"])
    except CannotBuild as error:
        result.update(built=False, reason=str(error))
    result["seconds"] = round(time.perf_counter() - started, 2)
    return result


def _subject(task: str, class_name: str) -> Subject:
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


def own_plans(model: PreTrainedModel) -> list[str]:
    """Returns which plans transformers has for layers of the model: "tp", "pp"."""
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    return [plan for plan in ("tp", "pp") if any(getattr(c, f"base_model_{plan}_plan", None) for c in configs)]


# Outputs that hold state, not results.
_NOT_COMPARED = ("past_key_values", "cache", "cache_params", "mems", "state", "past_buckets_states", "rnn_state")


def tensors(output: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The floating-point tensors of an output by name; those of an output within as "outer.name"."""
    found = {}
    for name, value in output.items():
        if name in _NOT_COMPARED:
            continue
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            found[name] = value
        elif isinstance(value, Mapping):
            found.update({f"{name}.{inner}": tensor for inner, tensor in tensors(value).items()})
    return found


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest expected value; infinite for another shape or a NaN."""
    if got.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    scale = max(float(expected.abs().max()), torch.finfo(expected.dtype).tiny)
    error = float((got.to(expected.dtype) - expected).abs().max()) / scale
    return error if error == error else float("inf")


def _compare(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> dict[str, Any]:
    if missing := sorted(set(expected) - set(got)):
        return {"verdict": "wrong", "reason": f"no output {', '.join(missing)}"}
    errors = {name: relative_error(got[name], value) for name, value in expected.items()}
    worst = max(errors, key=lambda name: errors[name])
    if errors[worst] <= tolerance:
        return {"verdict": "right", "error": errors[worst]}
    return {"verdict": "wrong", "error": errors[worst], "reason": f"{worst} is off by {errors[worst]:.1e}"}


def _check_mesh(subject: Subject, mesh: Mesh, result: dict[str, Any]) -> dict[str, Any]:
    compiled = adx.compile(subject.model, tp=mesh[0], pp=mesh[1], input_names=tuple(subject.inputs))
    if mesh == MEASURED_MESH:
        result["share_sharded"] = sharded_share(compiled.plan)
        counts = collectives_per_layer(compiled)
        result["all_reduces_per_layer"], result["all_gathers_per_layer"] = counts or (None, None)
    got = tensors(compiled.simulate(**subject.inputs))
    entry = _compare(got, subject.expected, TOLERANCE[subject.dtype])
    if entry["verdict"] == "wrong" and _is_rounding(subject, compiled, entry):
        return {"verdict": "right", "error": entry["error"], "rounds": True}
    if entry["verdict"] == "wrong":
        entry["reason"] += _why_wrong(subject, compiled, got, entry.get("error", math.inf))
    return entry


def _is_rounding(subject: Subject, compiled: CompiledModel, entry: dict[str, Any]) -> bool:
    """Returns whether a difference is no larger than what rounding its weights to float32 does to the model itself,
    parts of which compute in float32 whatever its dtype, and all ranks compute what the traced graph does where
    everything is in float64."""
    if not 0.0 < entry.get("error", math.inf) <= min(_SLIGHTLY, _change_by_rounding(subject)):
        return False
    try:
        compiled.verify_numeric()
    except AutodistError:
        return False
    return True


def _change_by_rounding(subject: Subject) -> float:
    """Returns by how much the model's own output changes when its weights are rounded to float32."""
    moved = copy.deepcopy(subject.model)
    for parameter in moved.parameters():
        parameter.copy_(parameter.float())
    own = tensors(forward(moved, subject.inputs))
    return max(relative_error(own[name], value) for name, value in subject.expected.items())


_SLIGHTLY = 1e-4  # an error that float32 may be the reason of, within a model of float64


def _why_wrong(subject: Subject, compiled: CompiledModel, got: dict[str, torch.Tensor], error: float) -> str:
    """Returns what the model itself does, where that explains it: it is wrong all the same."""
    if "use_cache" in inspect.signature(subject.model.forward).parameters:
        without = tensors(subject.model(**subject.inputs, use_cache=False))
        if _compare(got, without, TOLERANCE[subject.dtype])["verdict"] == "right":
            cached = tensors(compiled.simulate(**subject.inputs, use_cache=True))
            same = _compare(cached, subject.expected, TOLERANCE[subject.dtype])["verdict"]
            return (
                "; equal to the model called with use_cache=False, which by itself differs from its default, "
                f"use_cache=True; called with that, the split model is {same}, too"
            )
    if error > _SLIGHTLY:
        return ""
    change = _change_by_rounding(subject)
    return f"; the model's own output changes by {change:.1e} when its weights are rounded to float32"


def _check_decoding(subject: Subject, meshes: Sequence[Mesh], seconds: float, checked: dict[str, Any]) -> None:
    """Fills `checked` per mesh; leaves it empty for a model that has no `past_key_values`."""
    expected = eager_decoding(subject.model, subject.inputs)
    if expected is None:
        return
    for mesh in DECODING_MESHES:
        if mesh in meshes:
            check = partial(_check_decoding_on, subject, mesh, expected)
            checked[mesh_name(mesh)] = _guarded(check, seconds)


def _check_decoding_on(subject: Subject, mesh: Mesh, expected: Sequence[Parts]) -> dict[str, Any]:
    compiled = adx.compile(subject.model, tp=mesh[0], pp=mesh[1], use_cache=True)
    got = decode_with_cache(compiled, subject.model, subject.inputs)
    verdicts = [
        _compare(
            {"logits": counted(got, got, subject.inputs)},
            {"logits": counted(truth, got, subject.inputs)},
            TOLERANCE[subject.dtype],
        )
        for truth in expected
    ]
    entry = min(verdicts, key=lambda v: v.get("error", float("inf")))
    if entry["verdict"] == "wrong" and _is_rounding(subject, compiled, entry):
        return {"verdict": "right", "error": entry["error"], "rounds": True}
    return entry


def _guarded(check: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Returns what the check says; of an error on purpose its message as a refusal, of any other one where it came
    from."""
    started = time.perf_counter()
    try:
        with _time_limit(seconds):
            entry = check()
    except AutodistError as error:
        entry = {"verdict": "refused", "error_class": type(error).__name__, "reason": _one_line(error)}
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if any(f"/{p}/" in f.filename for p in ("autodist_fx", "passes", "cost_model"))]
        where = ours[-1] if ours else frames[-1]
        reason = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {_one_line(error)[:300]}"
        entry = {"verdict": "crashed", "error_class": type(error).__name__, "reason": reason}
    return {**entry, "seconds": round(time.perf_counter() - started, 2)}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError where the main thread is by then, so that the line that hangs is known."""

    def expire(*_: object) -> None:
        raise TimeoutError(f"still at it after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def mesh_name(mesh: Mesh) -> str:
    return f"{mesh[0]}x{mesh[1]}"


__all__ = ["check_type", "mesh_name", "own_plans", "relative_error", "tensors"]
