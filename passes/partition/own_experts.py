"""Expert parallelism: drops the experts of other ranks from a rank's graph; what is left of their sum is Partial.

    before  %s_0 = index_add(%zeros, 0, %rows_0, %expert_0); %s_1 = index_add(%s_0, 0, %rows_1, %expert_1); use(%s_1)
    after   (expert 1 is another rank's)  %s_0 = index_add(%zeros, 0, %rows_0, %expert_0); use(%s_0)

    before  %all = join_rows([%expert_0, %expert_1], %rows, %counts)
    after   %all = join_own_rows([%expert_0], %rows, %counts, 0)

The sum is owed over the ranks: what is left out here is added elsewhere. `meta["stands_for"]` of the last term that is
left names the op whose result it takes the place of.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Graph, Node
from torch.fx.node import map_arg

from cost_model.plan.data import OpPlan
from passes.fx import node_meta
from passes.ops.data_dependent import join_own_rows
from passes.partition.context import RankContext


def copy_own(graph: Graph, node: Node, ctx: RankContext, here: Callable[[Node], Node]) -> Node | None:
    """Copies a node of the whole model into `graph` for this rank: itself; the sum that other ranks add to; or nothing.

    `here` gives the node that stands for one before it.
    """
    op = ctx.plan.op(node.name)
    if op.owner not in (None, ctx.tp_rank):
        if not op.is_term:
            return None
        before = here(node.args[0])
        if ctx.plan.has_op(before.name) and ctx.plan.op(before.name).is_term:
            node_meta.set_stands_for(before, node.name)
        return before
    if op.kind == "join_rows" and any(p.is_owned for p in op.inputs):
        return _join_own(graph, node, op, here, ctx.tp_rank)
    return graph.node_copy(node, here)


def _join_own(graph: Graph, node: Node, op: OpPlan, here: Callable[[Node], Node], tp_rank: int) -> Node:
    pieces, rows, counts = node.args
    own = [i for i, placement in enumerate(op.inputs[: len(pieces)]) if placement.dim == tp_rank]
    args = map_arg(([pieces[i] for i in own], rows, counts), here)
    joined = graph.create_node("call_function", join_own_rows, (*args, own[0]), name=node.name)
    node_meta.copy(node, joined)
    return joined
