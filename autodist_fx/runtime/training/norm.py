"""Computes the norm of all gradients of a model, each element once, whoever holds it and however often."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from autodist_fx.runtime.training.gradient_sums import Gradients, Slices, first_paths, place_of
from passes.program.gradient_sums import Box, Holder, ParamUse, cells, contains
from passes.program.rank_program import RankProgram

Squares = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_'s


def counted_places(program: RankProgram) -> dict[str, list[Slices]]:
    """Return, by the first path of each tensor, the places in a rank's parameters whose gradients it counts in the
    norm: those that no rank before it holds, nor another tensor on it.

    Uses are those of each stage's first rank, and what that does not hold another one has alone (dealt experts).
    """
    by_source: dict[str, list[tuple[int, ParamUse]]] = {}
    for stage in sorted(program.stage_uses):
        for use in program.stage_uses[stage]:
            by_source.setdefault(use.source, []).append((stage, use))
    found: dict[str, list[Slices]] = {}
    first = first_paths(program)
    for path in dict.fromkeys(first.values()):
        if program.param_shards[path].source not in by_source:
            found[path] = [()]
    for uses in by_source.values():
        for box, (rank, path) in _first_holders(program, uses):
            if rank == program.rank:
                found.setdefault(first[path], []).append(place_of(program.param_shards[path], box))
    return found


def wanted_in_parts(program: RankProgram, places: Mapping[str, Sequence[Slices]]) -> set[str]:
    """Return the first paths of the tensors whose gradients nobody wants beyond what he steps of them: those that are
    terms of no sum, and that the norm counts (`places`) whole or not at all."""
    first = first_paths(program)
    summed = {
        first[path]
        for owed in program.grad_sums or ()
        for rank, path in (*owed.terms, *owed.holders)
        if rank == program.rank
    }
    found = set()
    for path in set(first.values()) - summed:
        parameter = program.graph_module.get_parameter(path)
        counted = sum(parameter.detach()[place].numel() for place in places.get(path, ()))
        if counted in (0, parameter.numel()):
            found.add(path)
    return found


def _first_holders(program: RankProgram, uses: Sequence[tuple[int, ParamUse]]) -> list[tuple[Box, Holder]]:
    """Return (box, who counts it) for boxes that cover all elements of a parameter that anyone holds."""
    found = []
    boxes = [box for _, use in uses for t in use.holders for box in use.boxes(t)]
    for cell in cells(boxes):
        holders = (
            (program.mesh.rank(stage, t), use.path)
            for stage, use in uses
            for t in use.holders
            if any(contains(box, cell) for box in use.boxes(t))
        )
        first = next(holders, None)
        if first is not None:
            found.append((cell, first))
    return found


def sum_of_squares(gradients: Gradients, places: Mapping[str, Sequence[Slices]]) -> float:
    """Return the sum of the squares of the gradients at these places, in float64."""
    pieces = [gradients[path][place] for path, own in places.items() if path in gradients for place in own]
    if not pieces:
        return 0.0
    dtype = torch.float32 if any(p.dtype in (torch.float16, torch.bfloat16) for p in pieces) else None
    norms = torch._foreach_norm(pieces, 2, dtype=dtype)
    return float(torch.stack([norm.double() for norm in norms]).square().sum())


def clip(gradients: Sequence[torch.Tensor], norm: float, max_norm: float) -> None:
    """Scale the gradients, in place, so that a norm of all of them that is larger than `max_norm` becomes it, as
    torch.nn.utils.clip_grad_norm_ does."""
    if gradients and (factor := max_norm / (norm + _EPSILON)) < 1.0:
        torch._foreach_mul_(list(gradients), factor)
