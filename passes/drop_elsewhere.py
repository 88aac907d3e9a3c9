"""drop_elsewhere: what the plan has run on another tp rank alone (its experts) is no node of this rank's graph.

    before  %s_0 = index_add(%zeros, 0, %rows_0, %expert_0); %s_1 = index_add(%s_0, 0, %rows_1, %expert_1); use(%s_1)
    after   (expert 1 is another rank's)  %s_0 = index_add(%zeros, 0, %rows_0, %expert_0); use(%s_0)

    before  %all = join_rows([%expert_0, %expert_1], %rows, %counts)
    after   %all = join_own_rows([%expert_0], %rows, %counts, 0)

The sum is owed over the ranks: what is left out here is added elsewhere. `meta["stands_for"]` of the last term that is
left names the op whose result it takes the place of.
"""

from __future__ import annotations

import torch.fx
from torch.fx import Node

from cost_model.plan import OpPlan
from passes.context import RankContext
from passes.data_dependent import join_own_rows
from passes.normalize import is_pure


def drop_elsewhere(module: torch.fx.GraphModule, ctx: RankContext) -> torch.fx.GraphModule:
    """`module`, or, where something is dropped, one without it and its weights."""
    dropped: set[Node] = set()  # or used by what was
    for node in reversed(list(module.graph.nodes)):
        op = ctx.plan.op(node.name) if ctx.plan.has_op(node.name) else None
        unused = node in dropped and not node.users and node.op not in ("placeholder", "output") and is_pure(node)
        if unused and not (op is not None and any(op.gather)):  # a collective is every rank's
            dropped.update(node.all_input_nodes)
            module.graph.erase_node(node)
        elif op is None:
            continue
        elif op.owner not in (None, ctx.tp_rank):  # what else used it is gone already
            if op.is_term:
                before = node.args[0]
                if ctx.plan.has_op(before.name) and ctx.plan.op(before.name).is_term:
                    before.meta["stands_for"] = node.meta.get("stands_for", node.name)
                node.replace_all_uses_with(before)
            dropped.update(node.all_input_nodes)
            module.graph.erase_node(node)
        elif op.kind == "join_rows" and any(p.is_owned for p in op.inputs):
            dropped.update(node.all_input_nodes)
            _join_own(node, op, ctx.tp_rank)
    if not dropped:
        return module
    kept = torch.fx.GraphModule(module, module.graph, class_name=type(module).__name__)
    kept.meta.update(module.meta)
    return kept


def _join_own(node: Node, op: OpPlan, tp_rank: int) -> None:
    pieces, rows, counts = node.args
    own = [i for i, placement in enumerate(op.inputs[: len(pieces)]) if placement.dim == tp_rank]
    node.target, node.args = join_own_rows, ([pieces[i] for i in own], rows, counts, own[0])
