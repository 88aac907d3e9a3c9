"""insert_send_recv: turns what crosses a stage's border into a recv at its first layer and a send at its last.

    before  %incoming_h = placeholder;  ...;  return ({"logits": ...}, (%h2,))
    after   %incoming_h = recv((%batch, %seq, 64), torch.float32, %device, source=0, channel=0);  ...
            send(%h2, to=2, channel=1);  return {"logits": ...}

A tp rank talks to the rank at its own place in the other stage. A length that the receiver cannot tell from the model's
inputs (frames after convolutions, tokens that a mask selects) is None in the recv, and the send is `sized`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx
from torch.fx import Node

from cost_model.errors import PlanError
from cost_model.plan.data import Hop
from passes.fx import node_meta
from passes.fx.run_passes import GraphEdit, PassResult
from passes.ops.comm import recv, send
from passes.partition.context import RankContext


def insert_send_recv(module: torch.fx.GraphModule, ctx: RankContext) -> PassResult:
    """Rewrites `module` in place; afterwards it takes the model's inputs only, and returns the dict of outputs.

    Matches are the tensors that come or go.
    """
    graph, edit = module.graph, GraphEdit(module)
    incoming = [n for n in graph.nodes if n.op == "placeholder" and node_meta.has_hop(n)]
    lengths = _Lengths(graph)
    for node in sorted(incoming, key=lambda n: node_meta.hop(n).channel):
        hop: Hop = node_meta.hop(node)
        with graph.inserting_before(lengths.first_computed()):
            shape = _shape(node, hop, ctx, lengths)
            received = graph.call_function(
                recv,
                (shape, node_meta.tensor(node).dtype, lengths.device()),
                {"source": ctx.mesh.rank(hop.source, ctx.tp_rank), "channel": hop.channel},
            )
        node_meta.copy(node, received)
        name = node.name
        node.replace_all_uses_with(received)
        graph.erase_node(node)
        received.name = name
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    outputs, owed = output.args[0]
    for hop, value in zip((h for h in ctx.plan.hops if h.source == ctx.stage), owed, strict=True):
        with graph.inserting_before(output):
            told = {"sized": True} if any(map(_is_unknown, node_meta.symbols(value))) else {}
            node = graph.call_function(
                send, (value,), {"to": ctx.mesh.rank(hop.target, ctx.tp_rank), "channel": hop.channel, **told}
            )
        node_meta.copy(value, node)
        node_meta.set_hop(node, hop)
    output.args = (outputs,)
    module.recompile()
    return edit.result(len(incoming) + len(owed))


def _shape(node: Node, hop: Hop, ctx: RankContext, lengths: _Lengths) -> tuple[Any, ...]:
    """Returns the shape in which the tensor arrives: literals, and sizes that this rank reads off its own inputs."""
    sizes = list(node_meta.tensor(node).shape)
    op = ctx.plan.op(hop.op)
    placement, layout = op.outputs[hop.index], ctx.plan.layout(op.output_layouts[hop.index])
    if placement.is_shard and layout is not None and not hop.whole:
        sizes[placement.dim] = layout.local_size(ctx.tp_rank)
    return tuple(
        (None if _is_unknown(symbol) else lengths.node(symbol, hop)) if symbol else size
        for size, symbol in zip(sizes, node_meta.symbols(node), strict=True)
    )


def _is_unknown(symbol: str) -> bool:
    return symbol.startswith("?")


class _Lengths:
    """Makes nodes for the sizes ("B", "S", "B*S", "B*16") and the device of the graph's inputs, where there are none
    yet."""

    def __init__(self, graph: torch.fx.Graph) -> None:
        self.graph = graph
        self.inputs = [n for n in graph.nodes if n.op == "placeholder" and not node_meta.has_hop(n)]
        self.known: dict[str, Node] = {}
        self._device: Node | None = None
        for node in list(graph.nodes):  # a list: nodes are moved
            if node.op == "call_function" and node.target is torch.ops.aten.sym_size.int:
                symbols = node_meta.symbols(node.args[0])
                if node.args[0] in self.inputs and symbols[node.args[1]]:
                    self.known.setdefault(symbols[node.args[1]], node)
                    self._hoist(node)
            elif node.op == "call_function" and node.target is getattr and node.args[1] == "device":
                self._device = node
                self._hoist(node)

    def _hoist(self, node: Node) -> None:
        """Moves a node that reads an input's size before anything that is computed, hence before a recv needs it."""
        self.inputs[-1].append(node)

    def first_computed(self) -> Node:
        """Returns the first node that is neither an input nor one of these."""
        mine = {*self.known.values(), self._device}
        return next(n for n in self.graph.nodes if n.op != "placeholder" and n not in mine and n.target is not recv)

    def node(self, symbol: str, hop: Hop) -> Node:
        """Returns the node of a size symbol, or product of such; `hop` is what an error names."""
        if symbol not in self.known:
            self.known[symbol] = self._make(symbol, hop)
        return self.known[symbol]

    def _make(self, symbol: str, hop: Hop) -> Node:
        if "*" in symbol:
            left, _, right = symbol.rpartition("*")
            factors = (self.node(left, hop), int(right) if right.isdecimal() else self.node(right, hop))
            return self.graph.call_function(operator.mul, factors)
        for node in self.inputs:
            symbols = node_meta.symbols(node)
            if node_meta.is_tensor(node) and symbol in symbols:
                dim = symbols.index(symbol)
                made = self.graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
                node_meta.set_val(made, node_meta.tensor(node).shape[dim])
                return made
        raise PlanError(
            f"{hop.op} crosses from stage {hop.source} to {hop.target} with a length ({symbol}) that no input of the "
            f"model has: the receiver cannot know its shape; cut the pipeline elsewhere"
        )

    def device(self) -> Node:
        """Returns the node of the device that the graph's inputs are on."""
        if self._device is None:
            node = next(n for n in self.inputs if node_meta.is_tensor(n))
            self._device = self.graph.call_function(getattr, (node, "device"))
        return self._device
