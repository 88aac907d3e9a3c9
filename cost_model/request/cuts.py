"""Cuts that a user fixes: a module in front of which a stage begins, or the number of a repeated layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from cost_model.errors import PlanError
from cost_model.graph.op_graph import OpGraph
from cost_model.request.pins import nearest_names

Cut = int | str
_NUMBERED = re.compile(r"^(?:(.+?)\.)?(\d+)(?:\.|$)")  # "model.layers" and "12" of "model.layers.12.mlp"


def cut_positions(graph: OpGraph, sequence: Sequence[str], cuts: Sequence[Cut], stages: int) -> list[int]:
    """Returns the positions in `sequence` (op names in execution order) at which stages 1, 2, ... begin.

    A cut is a module path, "model.layers.12": the stage begins with the first op of that module; or a number, 12, if
    only one list of modules has a module of that number. Raises PlanError that names the cut.
    """
    if len(cuts) != stages - 1:
        raise PlanError(
            f"{len(cuts)} cut{'s' if len(cuts) != 1 else ''} given, and pp={stages} has {stages - 1}: name a module "
            f"for each stage but the first, or leave cuts out"
        )
    first = _first_positions(graph, sequence)
    positions: list[int] = []
    for cut in cuts:
        at = first.get(path := _path(cut, first))
        if at is None:
            raise PlanError(_unknown(path, first))
        if positions and at <= positions[-1]:
            before = cuts[len(positions) - 1]
            raise PlanError(
                f"cut {cut!r} does not come after cut {before!r} in the order in which the model runs: name the cuts "
                "in that order, each once"
            )
        if not any(graph[ref.op].kind == "param" for name in sequence[:at] for ref in graph[name].inputs):
            raise PlanError(f"cut {cut!r}: {path} is where the model begins, and no weights would be left before it")
        positions.append(at)
    return positions


def _first_positions(graph: OpGraph, sequence: Sequence[str]) -> dict[str, int]:
    """Maps each module path to the position of the first op that the module, or a module inside it, runs."""
    found: dict[str, int] = {}
    for i, name in enumerate(sequence):
        atoms = graph[name].module.split(".")
        for n in range(1, len(atoms) + 1):
            found.setdefault(".".join(atoms[:n]), i)
    found.pop("", None)
    return found


def _path(cut: Cut, first: Mapping[str, int]) -> str:
    """Resolves a cut to a module path. Raises PlanError for a number that no list of modules has, or several have."""
    if not isinstance(cut, int) or isinstance(cut, bool):
        return str(cut)
    lists: dict[str, set[int]] = {}
    for path in first:
        match = _NUMBERED.match(path)
        if match:
            lists.setdefault(match[1] or "", set()).add(int(match[2]))
    having = [f"{name}.{cut}" if name else str(cut) for name, numbers in lists.items() if cut in numbers]
    if len(having) == 1:
        return having[0]
    if having:
        raise PlanError(f"cut {cut} could be {' or '.join(having)}: name the module")
    ranges = ", ".join(f"{name}.{min(numbers)} to {max(numbers)}" for name, numbers in lists.items())
    raise PlanError(f"no layer {cut} to cut at: there are {ranges or 'no numbered layers; name a module'}")


def _unknown(path: str, first: Mapping[str, int]) -> str:
    close = nearest_names(path, list(first))
    return f"cut {path!r}: the model runs no such module" + (f"; the nearest: {', '.join(close)}" if close else "")
