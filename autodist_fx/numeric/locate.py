"""Finds where ranks and model part: the first node of a rank
whose value is not the planned share of the model's own value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from cost_model.partition_plan import PartitionPlan
from passes.program.rank_program import RankProgram
from passes.verify.core.held import Held, as_planned, elements


def first_difference(
    plan: PartitionPlan, programs: Sequence[RankProgram], whole: Any, ranks: Sequence[Any]
) -> tuple[RankProgram, Node] | None:
    """Return the first node that differs, and the program of its rank; None where none of the model's nodes does.

    `whole` and `ranks` are Doubles that have run with keep=True.
    """
    wanted = {node.name: value for node, value in whole.env.items()}
    for stage in range(plan.mesh.pp):
        group = plan.mesh.tp_group(stage)
        values = [{node.name: (node, value) for node, value in ranks[r].env.items()} for r in group]
        for name in values[0]:
            if name not in wanted or not plan.has_op(name):
                continue
            for place, rank in enumerate(group):
                if not _agrees(plan, name, wanted[name], values, place):
                    node = values[place].get(name, values[0][name])[0]
                    return programs[rank], node
    return None


def _agrees(
    plan: PartitionPlan, name: str, whole: Any, values: Sequence[Mapping[str, tuple[Node, Any]]], place: int
) -> bool:
    """True if the value of node `name` on the rank at `place` of its tp group is the planned share of `whole`."""
    found = values[place].get(name, (None, None))[1]
    if not isinstance(whole, torch.Tensor) or not isinstance(found, torch.Tensor):
        return True
    op = plan.op(name)
    lies = as_planned(op.outputs[0], plan.layout(op.output_layouts[0]), place)
    if lies.partial:
        terms = [v[name][1] for v in values if name in v]
        found = sum(terms[1:], terms[0]) if all(t.shape == whole.shape for t in terms) else found
    wanted = _share(whole, lies)
    return found.shape == wanted.shape and torch.allclose(found, wanted.to(found.dtype), rtol=1e-6, equal_nan=True)


def _share(whole: torch.Tensor, lies: Held) -> torch.Tensor:
    """Return the elements of `whole` that a rank holds, as `lies` describes them."""
    if not lies.is_sharded:
        return whole
    index = torch.from_numpy(elements(lies, whole.shape[lies.dim]))
    return whole.index_select(lies.dim, index)
