"""Divides the rows of a call among microbatches, and puts together what the microbatches give."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from autodist_fx.calls.call import Call
from passes.program.row_division import RowDivision


def rows_of(call: Call, division: RowDivision) -> int:
    """Return the number of rows of a call; 1 where its inputs do not agree on it, or their rows cannot be divided."""
    counts = {x.shape[dim] for name, dim in division.inputs.items() if (x := call.tensors.get(name)) is not None}
    return counts.pop() if len(counts) == 1 and not division.reason else 1


def spans(rows: int, count: int) -> list[tuple[int, int]]:
    """Return (first row, row behind the last) of each of `count` parts, as even as can be, the larger ones first."""
    count = max(1, min(count, rows))
    size, larger = divmod(rows, count)
    edges = [part * size + min(part, larger) for part in range(count + 1)]
    return list(itertools.pairwise(edges))


def divided(call: Call, division: RowDivision, count: int) -> list[Call]:
    """Return `count` calls of some rows each, which together have all rows of `call`, in order; inputs that are the
    same for all rows are whole in each."""
    parts = []
    for start, stop in spans(rows_of(call, division), count):
        own = {
            name: x.narrow(division.inputs[name], start, stop - start) if name in division.inputs else x
            for name, x in call.tensors.items()
        }
        parts.append(replace(call, tensors=own))
    return parts


def joined(outputs: Sequence[Mapping[str, Any]], division: RowDivision) -> dict[str, Any]:
    """Return the flat outputs of the whole batch, of those of its parts in order."""
    if len(outputs) == 1:
        return dict(outputs[0])
    return {
        name: torch.cat([part[name] for part in outputs], division.outputs[name]) if name in division.outputs else value
        for name, value in outputs[0].items()
    }
