"""insert_collectives: inserts a collective where a consumer wants a tensor in another placement than its producer
leaves it.

    before  %o = call_module[o_proj](%x)                        # a sum over ranks is owed (P)
            %h = %residual + %o
    after   %o = call_module[o_proj](%x); %r = all_reduce(%o, axis="tp")
            %h = %residual + %r

One collective a tensor, right behind its producer, however many consumers there are; a rank that wants its piece of a
whole tensor cuts it out without asking anybody, and one that wants a term of a sum has it (rank 0) or zeros.
"""

from __future__ import annotations

import functools

import torch
import torch.fx
from torch.fx import Node
from torch.fx.node import map_arg

from cost_model.graph.placement import REPLICATE, Layout, Placement
from cost_model.plan.data import Hop, OpPlan
from passes.fx import node_meta
from passes.fx.arguments import map_tensor_arguments, tensor_source
from passes.fx.run_passes import GraphEdit, PassResult
from passes.ops.comm import all_gather, all_reduce
from passes.ops.data_dependent import join_own_rows
from passes.ops.parallel_layers import one_term
from passes.partition.context import RankContext

AXIS = "tp"


def insert_collectives(module: torch.fx.GraphModule, ctx: RankContext) -> PassResult:
    """Rewrites `module` in place. Afterwards every tensor lies as its consumers want it.

    Matches are the tensors that some consumer wants otherwise.
    """
    if ctx.mesh.tp == 1:
        return PassResult(module)
    edit, inserter = GraphEdit(module), _Inserter(module, ctx)
    inserter.run()
    module.recompile()
    return edit.result(len({*inserter.whole, *inserter.terms, *(node for node, _ in inserter.pieces)}))


class _Inserter:
    def __init__(self, module: torch.fx.GraphModule, ctx: RankContext) -> None:
        self.module, self.graph, self.ctx = module, module.graph, ctx
        self.params = {p.name: p for p in ctx.plan.params}
        self.whole: dict[Node, Node] = {}
        self.terms: dict[Node, Node] = {}
        self.pieces: dict[tuple[Node, int], Node] = {}

    def run(self) -> None:
        nodes = list(self.graph.nodes)
        for node in nodes:
            if node_meta.is_tensor(node) and not node_meta.has_hop(node) and not node_meta.is_constant(node):
                self._make_whole(node)
        for node in nodes:
            if node.op == "output":
                self._outputs(node)
            elif node.target is join_own_rows:
                continue  # takes what this rank alone has, and counts, which decide and hence are whole
            elif node_meta.has_reads_for(node):
                op, slot = node_meta.reads_for(node)
                map_tensor_arguments(node, functools.partial(self._wanted_at, op, slot))
            elif self.ctx.plan.has_op(node.name):
                op = self.ctx.plan.op(node.name)
                map_tensor_arguments(node, functools.partial(self._wanted, op))

    def _wanted(self, op: OpPlan, slot: int, node: Node) -> Node:
        if slot >= len(op.inputs):  # an index that localize_shapes added
            return node
        return self._as(node, op.inputs[slot], op.input_layouts[slot])

    def _wanted_at(self, op: OpPlan, slot: int, _: int, node: Node) -> Node:
        """Returns the placement that a node wants which stands before input `slot` of `op`, and picks from it by an
        index."""
        return self._wanted(op, slot, node)

    def _lies(self, node: Node) -> tuple[Placement, Layout | None, bool]:
        """Returns (placement, layout of the sharded dim, whether the plan has it made whole) of a tensor of this
        rank."""
        name, index = tensor_source(node)
        if node.op == "get_attr":
            shard = self.ctx.param_shards.get(str(node.target))
            plan = self.params.get(shard.source) if shard is not None else None
            if plan is None:
                return REPLICATE, None, False
            return plan.placement, self.ctx.plan.layout(plan.layout), False
        if not self.ctx.plan.has_op(name):
            return REPLICATE, None, False  # an input of the model
        op = self.ctx.plan.op(name)
        return op.outputs[index], self.ctx.plan.layout(op.output_layouts[index]), op.gather[index]

    def _make_whole(self, node: Node) -> None:
        placement, layout, gather = self._lies(node)
        if not gather:
            return
        with self.graph.inserting_after(node):
            if placement.is_partial:
                made = self.graph.call_function(all_reduce, (node,), {"axis": AXIS})
            else:
                assert layout is not None
                made = self.graph.call_function(
                    all_gather, (node,), {"axis": AXIS, "dim": placement.dim, "parts": layout.parts}
                )
        node_meta.copy(node, made, without=("constant",))
        self.whole[node] = made

    def _as(self, node: Node, wanted: Placement, layout_index: int) -> Node:
        """Returns the node that holds `node`'s value in the placement `wanted`, inserted where there is none yet."""
        if node_meta.is_constant(node) or node_meta.has_reads_for(node):
            return node
        source = tensor_source(node)
        if node_meta.has_hop(node):
            source = node_meta.hop(node).op, node_meta.hop(node).index
        if source in self.ctx.received:
            return self._received(self.ctx.received[source], wanted, layout_index)
        have, _, _ = self._lies(node)
        if have == wanted:
            return node
        whole = node if have.is_replicate else self.whole[node]
        return self._term(whole) if wanted.is_partial else self._piece(whole, wanted, layout_index)

    def _received(self, forms: tuple[Node, ...], wanted: Placement, layout_index: int) -> Node:
        for node in forms:
            hop: Hop = node_meta.hop(node)
            lies = REPLICATE if hop.whole else self.ctx.plan.op(hop.op).outputs[hop.index]
            if lies == wanted:
                return node
        whole = next(n for n in forms if node_meta.hop(n).whole)
        return self._term(whole) if wanted.is_partial else self._piece(whole, wanted, layout_index)

    def _term(self, node: Node) -> Node:
        """Makes a whole tensor rank 0's term of a sum over ranks (a bias behind a row-parallel product)."""
        if node not in self.terms:
            with self.graph.inserting_after(node):
                term = self.graph.call_function(one_term, (node, self.ctx.tp_rank))
            node_meta.copy(node, term, only=("val", "symbols", "source"))
            self.terms[node] = term
        return self.terms[node]

    def _piece(self, node: Node, wanted: Placement, layout_index: int) -> Node:
        if not wanted.is_shard:
            return node
        key = (node, wanted.dim)
        if key not in self.pieces:
            layout = self.ctx.plan.layout(layout_index)
            assert layout is not None
            runs = layout.parts[self.ctx.tp_rank] or ((0, 0),)
            cut: list[Node] = []
            with self.graph.inserting_after(node):
                for start, stop in reversed(runs):
                    one = self.graph.call_function(torch.narrow, (node, wanted.dim, start, stop - start))
                    node_meta.copy(node, one, only=("val", "symbols", "source"))
                    cut.insert(0, one)
            if len(cut) > 1:
                with self.graph.inserting_after(cut[-1]):
                    joined = self.graph.call_function(torch.cat, (cut, wanted.dim))
                node_meta.copy(cut[0], joined)
                cut = [joined]
            self.pieces[key] = cut[0]
        return self.pieces[key]

    def _outputs(self, node: Node) -> None:
        """Makes what leaves the model whole; what another stage gets is as the hop says."""
        outputs, owed = node.args[0]
        outputs = map_arg(outputs, lambda n: self._as(n, REPLICATE, -1) if node_meta.is_tensor(n) else n)
        hops = [h for h in self.ctx.plan.hops if h.source == self.ctx.stage]
        owed = tuple(self.whole.get(n, n) if hop.whole else n for n, hop in zip(owed, hops, strict=True))
        node.args = ((outputs, owed),)
