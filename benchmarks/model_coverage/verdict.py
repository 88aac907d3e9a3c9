"""Verdicts of checks: right, wrong, refused (an error on purpose) or crashed, with the reason."""

from __future__ import annotations

import contextlib
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from autodist_fx.errors import AutodistError, CommunicationError

Entry = dict[str, Any]  # "verdict", and what is known of: "error" (relative), "reason", "error_class", "seconds"

# Relative to the largest value of the output. Many models compute norms and rotary tables in float32 whatever their
# dtype, so that a last bit of float64 can become a last bit of float32 (6e-8).
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}

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


def compare(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> Entry:
    """Right or wrong by the worst of the expected outputs."""
    if missing := sorted(set(expected) - set(got)):
        return {"verdict": "wrong", "reason": f"no output {', '.join(missing)}"}
    errors = {name: relative_error(got[name], value) for name, value in expected.items()}
    worst = max(errors, key=lambda name: errors[name])
    if errors[worst] <= tolerance:
        return {"verdict": "right", "error": errors[worst]}
    return {"verdict": "wrong", "error": errors[worst], "reason": f"{worst} is off by {errors[worst]:.1e}"}


def guarded(check: Callable[[], Entry], seconds: float) -> Entry:
    """Returns what the check says; of an error on purpose its message as a refusal, of any other one where it came
    from."""
    started = time.perf_counter()
    try:
        with _time_limit(seconds):
            entry = check()
    except CommunicationError as error:  # a deadlock, say
        entry = {"verdict": "crashed", "error_class": type(error).__name__, "reason": _one_line(error)}
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


def mesh_name(mesh: tuple[int, int]) -> str:
    return f"{mesh[0]}x{mesh[1]}"


__all__ = ["TOLERANCE", "Entry", "compare", "guarded", "mesh_name", "relative_error", "tensors"]
