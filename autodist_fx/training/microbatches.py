"""Deals the rows of a batch to the replicas of a mesh, and to the microbatches of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from autodist_fx.calls.input_spec import InputSpec
from autodist_fx.errors import AutodistError

Batch = Mapping[str, Any]  # arguments of the model's forward, by name
_ROWS = "B"  # the size symbol of sequences


def batches_of(given: Batch | Sequence[Batch]) -> list[Batch]:
    """Return the batches of a step: one, or the several that it accumulates. Raises AutodistError for anything else."""
    found = [given] if isinstance(given, Mapping) else list(given) if isinstance(given, (list, tuple)) else []
    if not found or not all(isinstance(batch, Mapping) for batch in found):
        raise AutodistError(
            f"step takes a batch (a dict of the model's inputs by name, labels among them) or a list of such batches, "
            f"and got {type(given).__name__}"
        )
    return found


def rows_of(batch: Batch, specs: Mapping[str, InputSpec]) -> int:
    """Return how many rows a batch, or a part of one, has; 0 where no input has any."""
    return next((len(batch[n].transpose(0, s.dims.index(_ROWS))) for n, s in specs.items() if _ROWS in s.dims), 0)


def deal(batch: Batch, specs: Mapping[str, InputSpec], replicas: int, microbatches: int) -> list[list[dict[str, Any]]]:
    """Return, for each replica, its microbatches: parts of the rows of every input that has some (a dim "B" in its
    spec), in order and as even as can be. What has no rows is in each part.

    Raises AutodistError where there are fewer rows than parts.
    """
    parts = replicas * microbatches
    found: list[dict[str, Any]] = [dict(batch) for _ in range(parts)]
    for name, spec in specs.items():
        if _ROWS in spec.dims:
            dim = spec.dims.index(_ROWS)
            rows = batch[name].shape[dim]
            if rows < parts:
                dealt = f"{microbatches} microbatch{'es' if microbatches > 1 else ''}"
                dealt += f" on each of dp={replicas} replicas" if replicas > 1 else ""
                many = f"{rows} row{'s' if rows > 1 else ''}"
                raise AutodistError(f"{name} has {many}, which cannot be dealt to {dealt}: give more, or ask less")
            for part, piece in zip(found, torch.tensor_split(batch[name], parts, dim), strict=True):
                part[name] = piece
    return [found[replica * microbatches : (replica + 1) * microbatches] for replica in range(replicas)]
