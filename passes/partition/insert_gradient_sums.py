"""insert_gradient_sums: inserts what a backward pass owes to other ranks, for a program that is to be trained.

    before  %n = rms_norm(%h); %q = q_proj(%n); %k = k_proj(%n)                  # q_proj, k_proj are cut by columns
    after   %n = rms_norm(%h); %c = copy_to_tp(%n, axis="tp"); %q = q_proj(%c); %k = k_proj(%c)

Every value has a gradient of one of three kinds, by what computed it:

    "whole"    computed from all of its inputs, by every rank alike: its gradient is the whole one, the same on each
    "terms"    computed in parts: the gradients that the ranks have of it (or of an element of it) are terms of a sum
    "partial"  a sum that is still owed (P): its gradient is the whole one, which is that of each of its terms

A reader that computes in parts, of a "whole" value, reads it through copy_to_tp. Values that every rank has whole, and
yet of "terms" (the one KV head of a fused q|k|v), go on as such through what all ranks do alike, up to where they meet
a "whole" value: there one_gradient turns one into the other. In Megatron-LM's words (Shoeybi et al. 2019) copy_to_tp is
f and all_reduce g; in those of PyTorch's spmd_types "whole" is I, "terms" R or V, "partial" P.

Also notes what of each parameter's gradient is owed (`ctx.param_uses`), which passes/program/gradient_sums.py makes
sums of.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.fx
from torch.fx import Node

from cost_model.errors import PlanError
from passes.fx import node_meta
from passes.fx.arguments import tensor_arguments, tensor_source
from passes.fx.differentiable import differentiable, own_parameters
from passes.fx.run_passes import GraphEdit, PassResult
from passes.ops.comm import all_gather, all_reduce, copy_to_tp, recv, send
from passes.ops.parallel_layers import one_gradient, one_term
from passes.partition.context import RankContext
from passes.program.gradient_sums import ParamUse

AXIS = "tp"
WHOLE, TERMS, PARTIAL = "whole", "terms", "partial"


def insert_gradient_sums(
    module: torch.fx.GraphModule, ctx: RankContext, *, whole: torch.fx.GraphModule
) -> PassResult:
    """Rewrites `module` in place. `whole` is the model's own graph. Matches are the values that are read through a node
    of it. Raises PlanError for a parameter that one module uses in parts and another whole."""
    edit = GraphEdit(module)
    inserter = _Inserter(module, ctx, {n.name for n in differentiable(whole)})
    inserter.run()
    ctx.param_uses = inserter.param_uses()
    module.recompile()
    return edit.result(len({*inserter.copies, *inserter.ones}))


class _Inserter:
    def __init__(self, module: torch.fx.GraphModule, ctx: RankContext, needed: set[str]) -> None:
        self.module, self.graph, self.ctx = module, module.graph, ctx
        self.needs = differentiable(module, lambda n: n.target is recv and node_meta.hop(n).op in needed)
        self.kinds: dict[Node, str] = {}
        self.copies: dict[Node, Node] = {}
        self.ones: dict[Node, Node] = {}
        # path of a parameter -> for each use whether a rank then has a term only, and the reader that can be told so
        self.uses: dict[str, list[tuple[bool, Node | None, Node]]] = {}
        self.alone: dict[str, int] = {}  # parameters that one tp rank has alone -> that rank
        self.early = self._early() if ctx.mesh.tp > 1 else set()

    def run(self) -> None:
        for node in list(self.graph.nodes):
            self._visit(node)
        self._settle_parameters()

    # -- what an op is ---------------------------------------------------------------------------------------------

    def _is_op(self, node: Node) -> bool:
        return node.op.startswith("call") and self.ctx.plan.has_op(node.name)

    def _in_parts(self, node: Node) -> bool:
        """Returns whether a rank computes a part, or a term, of what this op of the model computes."""
        op = self.ctx.plan.op(node.name)
        return any(not p.is_replicate for p in (*op.inputs, *op.outputs))

    def _is_parameter(self, node: Node) -> bool:
        return node.op == "get_attr" and node in self.needs

    def _readers(self, node: Node) -> Iterator[Node]:
        """Returns the readers of a tensor, or of any tensor of a tuple, as far as gradients come from them."""
        for user in node.users:
            if not node_meta.is_tensor(node) and user in self.needs and tensor_source(user)[0] == node.name:
                yield from self._readers(user)
            elif user in self.needs or user.target is send or user.op == "output":
                yield user

    def _early(self) -> set[Node]:
        """Returns the ops that all ranks do alike, and that are nevertheless to be done behind copy_to_tp: all that
        reads them computes in parts, and fewer elements are then added up (the tokens, rather than each expert's)."""
        found: set[Node] = set()

        def wants_terms(reader: Node) -> bool:
            if self._is_op(reader):
                return self._in_parts(reader) or reader in found
            return node_meta.has_reads_for(reader) or reader.target in (torch.narrow, torch.cat)

        for node in reversed(self.graph.nodes):
            if node not in self.needs or not node_meta.is_tensor(node) or node.op == "get_attr":
                continue
            candidates = []
            for user in node.users:
                alike = user in self.needs and self._is_op(user) and not self._in_parts(user)
                if alike and {a for a in user.all_input_nodes if a in self.needs} == {node}:
                    readers = list(self._readers(user))
                    if not own_parameters(self.module, user) and readers and all(map(wants_terms, readers)):
                        candidates.append(user)
            if candidates and node_meta.tensor(node).numel() <= sum(_numel(c) for c in candidates):
                found.update(candidates)
        return found

    # -- one node --------------------------------------------------------------------------------------------------

    def _visit(self, node: Node) -> None:
        if node.op == "output":
            for value in node.all_input_nodes:
                self._read(node, value, WHOLE)
        elif node.target is send and node.op == "call_function":
            value = node.args[0]
            hop = node_meta.hop(node)
            if value in self.needs:
                node.kwargs = {**node.kwargs, "gradient": True}
            if hop.whole or self.ctx.plan.op(hop.op).outputs[hop.index].is_replicate:
                self._read(node, value, WHOLE)
        elif node not in self.needs:
            return
        elif node.op == "get_attr":
            self.kinds[node] = WHOLE if self.ctx.param_layouts[str(node.target)] is None else TERMS
        elif node.op == "call_function" and node.target is recv:
            node.kwargs = {**node.kwargs, "gradient": True}
            hop = node_meta.hop(node)
            lies = self.ctx.plan.op(hop.op).outputs[hop.index]
            self.kinds[node] = WHOLE if hop.whole or lies.is_replicate else PARTIAL if lies.is_partial else TERMS
        elif node.op == "call_function" and node.target in (all_reduce, all_gather):
            self._read(node, node.args[0], TERMS if node.target is all_gather else PARTIAL)
            self.kinds[node] = WHOLE
        elif node.op == "call_function" and node.target is one_term:
            self._read(node, node.args[0], WHOLE)
            self.kinds[node] = PARTIAL
        elif self._is_op(node):
            self._op(node)
        elif tensor_source(node)[0] != node.name:
            self.kinds[node] = self.kinds[node.args[0]]  # an element of a tuple
        else:  # a piece of a whole tensor, or picked heads
            for a in tensor_arguments(node):
                self._read(node, a, TERMS)
            self.kinds[node] = TERMS

    def _op(self, node: Node) -> None:
        op = self.ctx.plan.op(node.name)
        inputs = [a for a in node.all_input_nodes if a in self.needs]
        if self._in_parts(node):
            wants, gives = TERMS, PARTIAL if any(p.is_partial for p in op.outputs) else TERMS
        else:
            given = {self.kinds[a] for a in inputs if not self._is_parameter(a)}
            wants = gives = TERMS if node in self.early or given == {TERMS} else WHOLE
        self.kinds[node] = gives
        for a in inputs:
            self._read(node, a, wants)
        for path in own_parameters(self.module, node):
            self._note(path, wants == TERMS, None, node)
        if op.lone_bias is not None:  # the sum over ranks adds the bias once
            biases = [str(a.target) for a in tensor_arguments(node)[op.lone_bias :] if a.op == "get_attr"]
            self.alone.update(dict.fromkeys(biases or [f"{node.target}.bias"], 0))

    def _read(self, node: Node, value: Node, wants: str) -> None:
        """Lets `node` read `value` so that the gradient which comes back is of the kind that `value` has."""
        if value not in self.needs:
            return
        if self._is_parameter(value):
            self._note(str(value.target), wants == TERMS, value, node)
        elif wants == TERMS and self.kinds[value] == WHOLE:
            node.replace_input_with(value, self._behind(value, self.copies, copy_to_tp, {"axis": AXIS}))
        elif wants == WHOLE and self.kinds[value] == TERMS:
            node.replace_input_with(value, self._behind(value, self.ones, one_gradient, {"tp_rank": self.ctx.tp_rank}))

    def _behind(self, value: Node, made: dict[Node, Node], target: object, keywords: dict[str, object]) -> Node:
        if value not in made:
            with self.graph.inserting_after(value):
                made[value] = self.graph.call_function(target, (value,), keywords)  # type: ignore[arg-type]
            node_meta.copy(value, made[value], only=("val", "symbols", "source"))
        return made[value]

    # -- parameters ------------------------------------------------------------------------------------------------

    def _note(self, path: str, term: bool, value: Node | None, reader: Node) -> None:
        self.uses.setdefault(path, []).append((term, value, reader))

    def _tensors(self) -> dict[str, list[str]]:
        """Groups the paths at which there is one and the same tensor, by the first of them."""
        first: dict[tuple[object, ...], str] = {}
        found: dict[str, list[str]] = {}
        for path, shard in self.ctx.param_shards.items():
            if path in self.uses:
                found.setdefault(first.setdefault((shard.source, shard.dim, shard.intervals), path), []).append(path)
        return found

    def _settle_parameters(self) -> None:
        """Makes one tensor's gradient one of one kind: where some uses give all of it and others a term, these are
        copies."""
        for paths in self._tensors().values():
            uses = [use for path in paths for use in self.uses[path]]
            if self.ctx.param_layouts[paths[0]] is not None or len({term for term, _, _ in uses}) < 2:
                continue
            for path in paths:
                for term, value, reader in self.uses[path]:
                    if term and value is None:
                        raise PlanError(
                            f"{path} is used whole in one place and on a share of the heads in another "
                            f"({reader.name}), so that its gradient is neither all there nor a sum that is owed: "
                            "compile with train=False, or with another tp"
                        )
                    if term and value is not None:
                        copy = self._behind(value, self.copies, copy_to_tp, {"axis": AXIS})
                        reader.replace_input_with(value, copy)
                self.uses[path] = [(False, value, reader) for _, value, reader in self.uses[path]]

    def param_uses(self) -> tuple[ParamUse, ...]:
        """Returns, for each parameter, what of its gradient this rank's graph leaves, and whether it is a term."""
        found = []
        tp_ranks = tuple(range(self.ctx.mesh.tp))
        owners = {p.name: p.placement.dim for p in self.ctx.plan.params if p.placement.is_owned}  # of experts' weights
        for path, paths in self._tensors().items():
            shard, layout = self.ctx.param_shards[path], self.ctx.param_layouts[path]
            alone = next((self.alone[p] for p in paths if p in self.alone), owners.get(shard.source))
            found.append(
                ParamUse(
                    source=shard.source,
                    path=path,
                    shape=shard.shape,
                    dim=shard.dim,
                    parts=() if layout is None else layout.parts,
                    owed=any(term for p in paths for term, _, _ in self.uses[p]),
                    holders=tp_ranks if alone is None else (alone,),
                )
            )
        return tuple(found)


def _numel(node: Node) -> int:
    value = node_meta.val(node)
    return sum(v.numel() for v in value) if isinstance(value, (tuple, list)) else int(value.numel())
