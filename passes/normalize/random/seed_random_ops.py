"""seed_random_ops: makes random ops functions of an input, so that their numbers depend on no mesh.

    before  %y = dropout(%x, 0.1, True)                                    # x [B, heads, S, T]
    after   %y = seeded_dropout(%x, %random_state, 3, 0.1, 4, (0, 1, 1))   # the graph's op number 3; rows along dim 0

The numbers are those of the ops' order in the whole graph, the same for every rank; where the rows of the batch lie
follows from the symbolic shape. What cannot be written so stays as it is, and is refused by name before a plan is made.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch import nn
from torch.fx import Node
from torch.nn import functional as F

from cost_model.errors import PlanError
from passes.fx import node_meta
from passes.fx.arguments import argument, submodule
from passes.fx.nodes import op_name
from passes.fx.randomness import unseeded_nodes
from passes.fx.run_passes import GraphEdit, PassResult
from passes.fx.shape_propagation import NormalizeContext
from passes.normalize.random.batch_rows import as_factors, batch_rows, length_node
from passes.ops.random import RANDOM_STATE, seeded_dropout, seeded_uniform

# Dropouts -> how many leading dims have a draw for each element; None: all.
_DROPOUTS: dict[Any, int | None] = {
    F.dropout: None, torch.dropout: None, F.dropout1d: 2, F.dropout2d: 2, F.dropout3d: 2,
    nn.Dropout: None, nn.Dropout1d: 2, nn.Dropout2d: 2, nn.Dropout3d: 2,
}  # fmt: skip
_DIMS = {F.dropout1d: 3, nn.Dropout1d: 3, F.dropout2d: 4, nn.Dropout2d: 4, F.dropout3d: 5, nn.Dropout3d: 5}
_UNIFORM = ("rand", "rand_like", "bernoulli", "uniform_")


def seed_random_ops(graph_module: torch.fx.GraphModule, ctx: NormalizeContext) -> PassResult:
    """Rewrites `graph_module` in place. Matches are the ops that it numbers; views must have their full shapes."""
    graph, edit, matches = graph_module.graph, GraphEdit(graph_module), 0
    state: Node | None = None
    for node in unseeded_nodes(graph_module):
        if not node.users:
            graph.erase_node(node)
            continue
        if state is None:
            state = _state(graph)
        try:
            _seed(node, state, matches)
        except PlanError:
            continue  # why_unseeded says so
        matches += 1
    if state is not None and not state.users:
        graph.erase_node(state)
    return edit.result(matches)


def why_unseeded(node: Node) -> str:
    """Returns why a random op that seed_random_ops has left is none of those that it rewrites."""
    try:
        _seed(node, None, 0)
    except PlanError as error:
        return str(error)
    return ""


def _state(graph: torch.fx.Graph) -> Node:
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    with graph.inserting_after(inputs[-1]):
        state = graph.placeholder(RANDOM_STATE)
    node_meta.set_val(state, torch.empty(3, dtype=torch.int64, device="meta"))
    node_meta.set_symbols(state, ("",))
    return state


def _seed(node: Node, state: Node | None, number: int) -> None:
    """Rewrites one op in place; with `state` None, only finds out whether it can. Raises PlanError where not."""
    module = submodule(node.graph.owning_module, str(node.target)) if node.op == "call_module" else None
    called = node.target if module is None else type(module)
    if called in _DROPOUTS:
        _seed_dropout(node, state, number, called, module)
    elif op_name(node) in _UNIFORM and node_meta.tensor(node).is_floating_point():
        _seed_uniform(node, state, number)
    elif called in (F.rrelu, nn.RReLU):
        _seed_rrelu(node, state, number, module)
    else:
        raise PlanError(f"no rule says how {op_name(node)} is drawn alike on every mesh")


def _seed_dropout(node: Node, state: Node | None, number: int, called: Any, module: Any) -> None:
    x, dims = node.args[0] if node.args else node.kwargs["input"], _DROPOUTS[called]
    p = argument(node, 1, "p", 0.5) if module is None else module.p
    in_place = argument(node, 3, "inplace", False) if module is None else module.inplace
    rank = node_meta.tensor(node).dim()
    if not isinstance(p, (int, float)):
        raise PlanError("its probability is computed")
    if in_place and len(x.users) > 1:
        raise PlanError("it writes into a tensor that others read")
    if dims is not None and rank != _DIMS[called]:
        raise PlanError(f"{op_name(node)} of {rank} dims takes the batch for channels")
    drawn = rank if dims is None else dims
    row = batch_rows(node, drawn)
    if state is not None:
        node.op, node.target = "call_function", seeded_dropout
        node.args, node.kwargs = (x, state, number, float(p), drawn, row), {}


def _seed_uniform(node: Node, state: Node | None, number: int) -> None:
    """Rewrites torch.rand and what is drawn like it; bernoulli is a comparison with its probability."""
    name, graph, value = op_name(node), node.graph, node_meta.tensor(node)
    low, high = 0.0, 1.0
    if name == "uniform_":
        low, high = argument(node, 1, "from", low), argument(node, 2, "to", high)
    args = _uniform_arguments(node, state, number, low, high)
    if state is None:
        return
    if name != "bernoulli":
        node.op, node.target, node.args, node.kwargs = "call_function", seeded_uniform, args, {}
        return
    p = argument(node, 1, "p")
    with graph.inserting_before(node):
        drawn = graph.call_function(seeded_uniform, args)
        hit = graph.call_function(torch.lt, (drawn, node.args[0] if p is None else p))
    for made in (drawn, hit):
        node_meta.copy(node, made)
    node_meta.set_val(hit, value.to(torch.bool))
    node.op, node.target, node.args, node.kwargs = "call_method", "to", (hit, value.dtype), {}


def _seed_rrelu(node: Node, state: Node | None, number: int, module: Any) -> None:
    """Rewrites rrelu in training mode: what is not positive has a slope of its own, drawn between its bounds."""
    x = node.args[0] if node.args else node.kwargs["input"]
    if (module.inplace if module is not None else argument(node, 4, "inplace", False)) and len(x.users) > 1:
        raise PlanError("it writes into a tensor that others read")
    bounds = (module.lower, module.upper) if module is not None else ()
    low, high = bounds or (argument(node, 1, "lower", 1 / 8), argument(node, 2, "upper", 1 / 3))
    args = _uniform_arguments(node, state, number, low, high)
    if state is None:
        return
    with node.graph.inserting_before(node):
        slopes = node.graph.call_function(seeded_uniform, args)
        positive = node.graph.call_function(torch.gt, (x, 0))
        scaled = node.graph.call_function(torch.mul, (x, slopes))
    for made in (slopes, positive, scaled):
        node_meta.copy(node, made)
    node_meta.set_val(positive, node_meta.tensor(node).to(torch.bool))
    node.op, node.target, node.args, node.kwargs = "call_function", torch.where, (positive, x, scaled), {}


def _uniform_arguments(node: Node, state: Node | None, number: int, low: Any, high: Any) -> tuple[Any, ...]:
    """Returns the arguments of seeded_uniform for numbers of a node's shape. Raises PlanError where they are computed,
    or nothing tells where the rows of the batch lie."""
    value = node_meta.tensor(node)
    row = batch_rows(node, value.dim())
    sizes = zip(value.shape, node_meta.symbols(node), strict=True)
    shape = tuple(length_node(node.graph, as_factors(n, symbol)) for n, symbol in sizes)
    if isinstance(low, Node) or isinstance(high, Node):
        raise PlanError("its bounds are computed")
    return (state, number, shape, value.dtype, float(low), float(high), row)
