"""localize_shapes: makes sizes that the model wrote for whole tensors the rank's.

    before  torch.reshape(%q, (%batch, %seq, 9, 64));   torch.repeat_interleave(%k, 3, 1)
    after   torch.reshape(%q, (%batch, %seq, 6, 64));   torch.repeat_interleave(%k, 3, 1)     # 2 of 3 KV heads

Where a rank's query heads don't fall on whole KV heads, the repetition becomes an index_select.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch.fx import Node

from cost_model.errors import PlanError
from cost_model.graph.placement import Layout
from cost_model.plan.data import OpPlan
from cost_model.rules.losses import CLASSES
from passes.fx import node_meta
from passes.fx.arguments import argument, map_tensor_arguments, tensor_arguments
from passes.fx.nodes import op_name
from passes.fx.run_passes import GraphEdit, PassResult
from passes.op_graph.losses import loss_settings
from passes.op_graph.reductions import reduced_dims
from passes.ops.comm import log_sum_exp
from passes.ops.losses import cross_entropy_part, widened
from passes.ops.parallel_layers import partial_mean
from passes.partition.context import RankContext


def localize_shapes(module: torch.fx.GraphModule, ctx: RankContext) -> PassResult:
    """Rewrites `module` in place. Matches are the nodes that got other sizes."""
    edit, matches = GraphEdit(module), 0
    for node in list(module.graph.nodes):
        if not ctx.plan.has_op(node.name):
            continue
        op = ctx.plan.op(node.name)
        rewrite = _REWRITES.get(op.kind)
        if rewrite is not None and any(p.is_shard for p in (*op.inputs, *op.outputs)):
            before = node.target, node.args, node.kwargs
            rewrite(module, ctx, node, op)
            matches += before != (node.target, node.args, node.kwargs)
    return edit.result(matches)


def _layout(ctx: RankContext, index: int) -> Layout:
    layout = ctx.plan.layout(index)
    assert layout is not None
    return layout


def _view(module: torch.fx.GraphModule, ctx: RankContext, node: Node, op: OpPlan) -> None:
    """Makes the sharded dim's size in a reshape or broadcast_to the rank's."""
    if not op.outputs[0].is_shard:
        return
    if not isinstance(node.args[1], tuple):
        raise ValueError(f"{node.name}: a view with unknown sizes cannot be sharded")
    dim = op.outputs[0].dim
    shape = list(node.args[1])
    shape[dim] = _layout(ctx, op.output_layouts[0]).local_size(ctx.tp_rank)
    node.args = (node.args[0], tuple(shape))


def _split(module: torch.fx.GraphModule, ctx: RankContext, node: Node, op: OpPlan) -> None:
    """Makes the sizes of a split or chunk along the sharded dim the rank's share of each piece."""
    dim = argument(node, 2, "dim", 0) % node_meta.tensor(node.args[0]).dim()
    if not op.inputs[0].is_shard or op.inputs[0].dim != dim:
        return
    sizes = []
    for piece, placement, layout in zip(node_meta.val(node), op.outputs, op.output_layouts, strict=True):
        if placement.is_owned and placement.dim != ctx.tp_rank:
            sizes.append(0)
        else:
            sizes.append(_layout(ctx, layout).local_size(ctx.tp_rank) if layout >= 0 else piece.shape[dim])
    node.op, node.target = "call_function", torch.split
    node.args, node.kwargs = (node.args[0], sizes, dim), {}


def _slice(module: torch.fx.GraphModule, ctx: RankContext, node: Node, op: OpPlan) -> None:
    """Moves the bounds of x[..., a:b] along the sharded dim to where they lie among the elements that the rank
    holds."""
    if not op.inputs[0].is_shard:
        return
    rank, dim = node_meta.tensor(node.args[0]).dim(), op.inputs[0].dim
    index = list(node.args[1]) if isinstance(node.args[1], tuple) else [node.args[1]]
    if Ellipsis in index:
        at = index.index(Ellipsis)
        missing = rank - sum(1 for i in index if i is not None and i is not Ellipsis)
        index[at : at + 1] = [slice(None)] * missing
    position = [i for i, item in enumerate(index) if item is not None]
    if dim >= len(position):
        return
    item = index[position[dim]]
    if type(item) is int:  # one of the rank's experts
        index[position[dim]] = _layout(ctx, op.input_layouts[0]).local_range(ctx.tp_rank, item, item + 1)[0]
        node.args = (node.args[0], tuple(index))
        return
    if not isinstance(item, slice) or (item.start is None and item.stop is None and item.step in (None, 1)):
        return
    layout = _layout(ctx, op.input_layouts[0])
    start, stop, step = item.indices(layout.size)
    if step == 1:
        index[position[dim]] = slice(*layout.local_range(ctx.tp_rank, start, stop))
    else:
        index[position[dim]] = _every(layout, ctx.tp_rank, start, stop, step)
    node.args = (node.args[0], tuple(index))


def _every(layout: Layout, tp_rank: int, start: int, stop: int, step: int) -> slice:
    """Returns where, in the rank's share, the elements start, start + step, ... below stop that it holds lie.

    What the rank holds of them lies equally far apart there (pairs of gate and up, say), since a factor ties them.
    """
    held = [layout.local_range(tp_rank, i, i + 1) for i in range(start, stop, step)]
    places = [a for a, b in held if b > a]
    between = {b - a for a, b in itertools.pairwise(places)} or {1}
    if len(between) != 1:
        raise ValueError(f"every {step}th of {layout.size} elements lies at {places} on tp rank {tp_rank}: no slice")
    return slice(places[0], places[-1] + 1, between.pop()) if places else slice(0, 0, 1)


def _mean(module: torch.fx.GraphModule, ctx: RankContext, node: Node, op: OpPlan) -> None:
    """Replaces a mean over a sharded dim by the sum of its elements wherever they are, over the number of all of
    them."""
    if not (op.outputs[0].is_partial and op.inputs[0].is_shard and op_name(node) == "mean"):
        return
    x, out = node_meta.val(node.args[0]), node_meta.val(node)
    cut = op.inputs[0].dim
    node.op, node.target = "call_function", partial_mean
    node.args = (node.args[0], reduced_dims(node), out.dim() == x.dim(), cut, x.shape[cut])
    node.kwargs = {name: value for name, value in node.kwargs.items() if name == "dtype"}


def _repeat(module: torch.fx.GraphModule, ctx: RankContext, node: Node, op: OpPlan) -> None:
    """Makes a repeat_interleave of KV heads to query heads the rank's, or an index_select where groups are cut."""
    dim = op.outputs[0].dim
    if not op.outputs[0].is_shard or dim != argument(node, 2, "dim") % node_meta.tensor(node).dim():
        return  # cut along a dim that is not repeated: each element as often as ever
    size = node_meta.tensor(node.args[0]).shape[dim]
    wanted = _kv_heads(ctx, op.output_layouts[0], op.input_layouts[0], size)
    held = _held(ctx, op.input_layouts[0], size)
    each, rest = divmod(len(wanted), held) if held else (0, 0)
    if rest == 0 and wanted == [i // each for i in range(len(wanted))]:
        node.args, node.kwargs = (node.args[0], each, dim), {}
        return
    index = _constant(module, node, wanted)
    node.op, node.target = "call_function", torch.index_select
    node.args, node.kwargs = (node.args[0], dim, index), {}


def _sdpa(module: torch.fx.GraphModule, ctx: RankContext, node: Node, op: OpPlan) -> None:
    """Picks keys and values for each query head in grouped attention whose groups are cut."""
    if op.factor == "heads" and not _layout(ctx, op.input_layouts[0]).local_size(ctx.tp_rank):
        _check_empty_attention(ctx, node)
    if not argument(node, 7, "enable_gqa", False) or op.factor != "heads":
        return
    q, k = tensor_arguments(node)[:2]
    head = node_meta.tensor(q).dim() - 3
    size = node_meta.tensor(k).shape[head]
    wanted = _kv_heads(ctx, op.input_layouts[0], op.input_layouts[1], size)
    held = _held(ctx, op.input_layouts[1], size)
    each, rest = divmod(len(wanted), held) if held else (0, 0)
    if rest == 0 and wanted == [i // each for i in range(len(wanted))]:
        return
    with module.graph.inserting_before(node):
        index = _constant(module, node, wanted)

    def pick(slot: int, argument: Node) -> Node:
        if slot not in (1, 2):
            return argument
        with module.graph.inserting_before(node):
            picked = module.graph.call_function(torch.index_select, (argument, head, index))
        node_meta.copy(argument, picked)
        node_meta.set_reads_for(picked, op, slot)  # insert_collectives gives it what the op wants there
        return picked

    map_tensor_arguments(node, pick)


def _check_empty_attention(ctx: RankContext, node: Node) -> None:
    """Raises PlanError where attention without heads would end the process, as it does before torch 2.12: its CPU
    kernels divide by their number."""
    if torch.__version__ < "2.12":  # by the parts of a version: torch's own comparison
        raise PlanError(
            f"rank {ctx.rank} has no heads of {node.name}, and torch {torch.__version__} cannot run attention without "
            "heads: take torch 2.12 or newer, a smaller tp, or pin the layer's projections to replicate"
        )


def _experts(module: torch.fx.GraphModule, ctx: RankContext, node: Node, op: OpPlan) -> None:
    """Says which experts the rank has, where whole ones are dealt out."""
    if op.factor == "experts":
        node.args = (*node.args[:11], _layout(ctx, op.input_layouts[3]).parts[ctx.tp_rank])


def _dropout(module: torch.fx.GraphModule, ctx: RankContext, node: Node, op: OpPlan) -> None:
    """Says which elements of its sharded dim the rank draws a mask for."""
    if op.outputs[0].is_shard:
        layout = _layout(ctx, op.output_layouts[0])
        node.args = (*node.args[:6], (op.outputs[0].dim, layout.size, tuple(layout.parts[ctx.tp_rank])))


def _cross_entropy(module: torch.fx.GraphModule, ctx: RankContext, node: Node, op: OpPlan) -> None:
    """Makes a loss over sharded classes this rank's term of it, behind the log of the sum of all classes' exps, which
    the ranks tell each other."""
    if op.factor != CLASSES:
        return
    settings = loss_settings(node)
    assert settings is not None
    layout, (scores, target) = _layout(ctx, op.input_layouts[0]), tensor_arguments(node)
    with module.graph.inserting_before(node):
        sums = module.graph.call_function(log_sum_exp, (scores,), {"axis": "tp", "dim": 1, "ranks": ctx.mesh.tp})
    node_meta.copy(scores, sums, only=("source",))
    node_meta.set_val(sums, widened(node_meta.tensor(scores).select(1, 0)))
    node_meta.set_symbols(sums, tuple(s for dim, s in enumerate(node_meta.symbols(scores)) if dim != 1))
    node_meta.set_reads_for(sums, op, 0)
    node.target, node.kwargs = cross_entropy_part, settings
    node.args = (scores, target, sums, (layout.size, tuple(layout.parts[ctx.tp_rank])))


def _groups(position: int) -> Callable[[torch.fx.GraphModule, RankContext, Node, OpPlan], None]:
    """Makes the handler of convolutions and norms in groups of channels: the number of groups becomes the rank's,
    which are whole ones."""

    def rewrite(module: torch.fx.GraphModule, ctx: RankContext, node: Node, op: OpPlan) -> None:
        if op.factor != "groups":
            return
        layout = _layout(ctx, op.output_layouts[0])
        groups = node.args[position] * layout.local_size(ctx.tp_rank) // layout.size
        node.args = (*node.args[:position], groups, *node.args[position + 1 :])

    return rewrite


def _held(ctx: RankContext, layout_index: int, size: int) -> int:
    layout = ctx.plan.layout(layout_index)
    return size if layout is None else layout.local_size(ctx.tp_rank)


def _kv_heads(ctx: RankContext, q_layout: int, kv_layout: int, kv_heads: int) -> list[int]:
    """Returns, for each query head that the rank holds, the place of its KV head among those that the rank holds."""
    queries = _layout(ctx, q_layout)
    keys = ctx.plan.layout(kv_layout)
    each = queries.size // kv_heads
    places = []
    for start, stop in queries.parts[ctx.tp_rank]:
        for head in range(start, stop):
            kv = head // each
            places.append(kv if keys is None else keys.local_range(ctx.tp_rank, kv, kv + 1)[0])
    return places


def _constant(module: torch.fx.GraphModule, node: Node, values: list[int]) -> Node:
    name = f"_heads_of_{node.name}"
    module.register_buffer(name, torch.tensor(values, dtype=torch.long), persistent=False)
    with module.graph.inserting_before(node):
        constant = module.graph.get_attr(name)
    node_meta.set_val(constant, torch.empty(len(values), dtype=torch.long, device="meta"))
    node_meta.set_symbols(constant, ("",))
    node_meta.set_constant(constant)
    return constant


_REWRITES: dict[str, Callable[[torch.fx.GraphModule, RankContext, Node, OpPlan], Any]] = {
    "view": _view,
    "expand": _view,
    "split": _split,
    "slice": _slice,
    "reduce": _mean,
    "repeat_interleave": _repeat,
    "sdpa": _sdpa,
    "experts": _experts,
    "dropout": _dropout,
    "cross_entropy": _cross_entropy,
    "conv": _groups(6),
    "group_norm": _groups(1),
}
