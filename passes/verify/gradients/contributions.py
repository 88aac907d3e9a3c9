"""Checks what a backward pass owes to other ranks, for programs that are to be trained.

Each rank's graph is read once more, with what rank.py found each node to hold, and every value that a gradient goes
through is given a kind. The invariant:

    "whole"    its gradient is the whole one, the same on each rank of the group
    "terms"    for each element, the gradients that the ranks holding it have are terms of a sum; a shard that no other
               rank has a piece of has that shard of the whole gradient
    "partial"  of a sum that is still owed (P): its gradient is the whole one

Backward is linear, so that terms stay terms through whatever the ranks compute; only a "whole" value that is read in
parts, and one met by "terms", would get a gradient that is neither. (Megatron-LM's f and g, Shoeybi et al. 2019; I, R
or V, and P of PyTorch's spmd_types.) Which ops run in parts is seen by all ranks of a stage together: a rank that holds
all KV heads does what the others do. Nothing is taken from the plan, nor from the pass that wrote copy_to_tp.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch.fx import Node

from cost_model.graph.op_graph import TensorRef
from passes.fx.arguments import argument
from passes.fx.differentiable import differentiable, own_parameters
from passes.ops.comm import all_gather, all_reduce, copy_to_tp, recv, send
from passes.ops.parallel_layers import one_gradient, one_term
from passes.program.rank_program import RankProgram
from passes.verify.core.held import WHOLE as ALL
from passes.verify.core.held import Held
from passes.verify.core.messages import Message, message
from passes.verify.core.report import Duty, fail, fail_plainly, on_rank
from passes.verify.core.state import RankFacts, Value, named
from passes.verify.gradients.sums import Tensors, check_grad_sums

WHOLE, TERMS, PARTIAL = "whole", "terms", "partial"
_MEANING = {
    WHOLE: "each rank has the whole gradient of it",
    TERMS: "each rank has a term of its gradient",
    PARTIAL: "it is a sum that is still owed",
}
_EXCHANGES = (all_reduce, all_gather, copy_to_tp, send, recv, one_gradient, one_term)


def check_gradients(facts: Sequence[RankFacts], pp: int) -> None:
    """Checks the programs of ranks 0, 1, ... of a mesh of `pp` stages, whose graphs `interpret` accepted.

    Programs for inference (`grad_sums` None, of all ranks) owe nothing. Raises VerificationError.
    """
    training = [f.program for f in facts if f.program.grad_sums is not None]
    if not training:
        return
    if len(training) < len(facts):
        lost = next(f.program for f in facts if f.program.grad_sums is None)
        fail_plainly(f"{on_rank(lost)} is for inference, and rank {training[0].rank} is to be trained", Duty.GRADIENTS)
    sent: dict[Message, str | None] = {}
    held: list[Tensors] = []
    tp = len(facts) // pp
    for stage in range(pp):
        group = facts[stage * tp : (stage + 1) * tp]
        in_parts = {op for of_rank in group for op in _run_in_parts(of_rank)}
        cut = {p for f in group for p, shard in f.program.param_shards.items() if _held(f.program, p) != ALL}
        readers = [_Reader(of_rank, in_parts, cut, sent) for of_rank in group]
        for reader in readers:
            reader.run()
            held.append(reader.tensors())
        _check_copies(readers)
    check_grad_sums([f.program for f in facts], held)


def _held(program: RankProgram, path: str) -> Held:
    shard = program.param_shards[path]
    if shard.dim is None or shard.intervals == ((0, shard.shape[shard.dim]),):
        return ALL
    return Held(shard.dim, shard.intervals)


# -- which ops run in parts --------------------------------------------------------------------------------------------


def _each(value: Value | tuple[Value, ...]) -> tuple[Value, ...]:
    return (value,) if isinstance(value, Value) else value


def _is_element(facts: RankFacts, node: Node) -> bool:
    return (
        node.op == "call_function"
        and getattr(node.target, "__name__", "") == "getitem"
        and isinstance(node.args[0], Node)
        and type(facts.values.get(node.args[0])) is tuple
    )


def _is_piece(node: Node, ref: TensorRef) -> bool:
    """Returns whether a node is cut out of a tensor, and no op of the model."""
    return node.op == "call_function" and node.name != ref.op and (
        node.target in (torch.narrow, torch.cat, torch.index_select)
    )


def _ops(facts: RankFacts) -> Iterator[tuple[Node, tuple[Value, ...]]]:
    """Returns the nodes that compute an op of the model (or a chain of them), with what comes out."""
    for node in facts.program.graph_module.graph.nodes:
        if not node.op.startswith("call") or node not in facts.values or node.target in _EXCHANGES:
            continue
        values = _each(facts.values[node])
        if not _is_element(facts, node) and not _is_piece(node, values[0].ref):
            yield node, values


def _run_in_parts(facts: RankFacts) -> Iterator[str]:
    """Returns the ops of which this rank computes a part, or a term of a sum."""
    for node, values in _ops(facts):
        given = [v for a in node.all_input_nodes if a in facts.values for v in _each(facts.values[a])]
        own = [_held(facts.program, path) for path in own_parameters(facts.program.graph_module, node)]
        if any(v.held != ALL for v in (*values, *given)) or any(h != ALL for h in own):
            yield values[0].ref.op


def _leading_out(graph: torch.fx.Graph, needs: set[Node]) -> set[Node]:
    """Returns the nodes that gradients come back to: all that something which leaves the rank is made of."""
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node.target is send or (node in found and node in needs):
            found.update(node.all_input_nodes)
    return found


# -- one rank ----------------------------------------------------------------------------------------------------------


@dataclass
class _Reader:
    """Reads one rank's graph, front to back."""

    facts: RankFacts
    in_parts: set[str]  # ops that some rank of the stage runs in parts
    cut: set[str]  # parameters that some rank of the stage has a part of
    sent: dict[Message, str | None]  # kind of what is on its way between stages; None: no gradient goes through it
    kinds: dict[Node, str] = field(default_factory=dict)
    needs: set[Node] = field(default_factory=set)
    used: set[Node] = field(default_factory=set)
    copies: list[tuple[Node, TensorRef]] = field(default_factory=list)
    uses: dict[str, dict[bool, Node]] = field(default_factory=dict)  # parameter -> whether terms come -> a reader

    def run(self) -> None:
        program = self.facts.program
        received = lambda n: n.target is recv and self.sent.get(message(program, n)) is not None  # noqa: E731
        self.needs = differentiable(program.graph_module, received)
        self.used = _leading_out(program.graph_module.graph, self.needs)
        computed = {node for node, _ in _ops(self.facts)}
        for node in program.graph_module.graph.nodes:
            if node.op == "output":
                self._output(node)
            elif node.op == "call_function" and node.target in (send, recv):
                self._message(node)
            elif node not in self.needs:
                continue
            elif node.op == "get_attr":
                self.kinds[node] = TERMS if str(node.target) in self.cut else WHOLE
            elif node.op == "call_function" and node.target in _EXCHANGES:
                self._exchange(node)
            elif node in computed:
                self._op(node)
            elif _is_element(self.facts, node):
                self.kinds[node] = self.kinds[node.args[0]]
            else:
                self._piece(node)

    def _fail(self, node: Node, what: str) -> None:
        fail(self.facts.program, node, what, missing=Duty.GRADIENTS)

    def _named(self, node: Node) -> str:
        """Formats a node, "mul_3", or where it has a name of its own "mul_3 (fused_mul_3)"."""
        value = self.facts.values.get(node)
        own = named(value.ref) if isinstance(value, Value) else node.name
        return own if own == node.name else f"{own} ({node.name})"

    def _is_parameter(self, node: Node) -> bool:
        return node.op == "get_attr" and node in self.needs

    def _note(self, path: str, terms: bool, node: Node) -> None:
        self.uses.setdefault(path, {}).setdefault(terms or path in self.cut, node)

    def _output(self, node: Node) -> None:
        for value in node.all_input_nodes:
            if self._is_parameter(value):
                self._note(str(value.target), False, node)
            elif self.kinds.get(value) == TERMS:
                self._fail(node, f"returns {value.name}, and {_MEANING[TERMS]} where all will have the whole")

    def _message(self, node: Node) -> None:
        key = message(self.facts.program, node)
        if node.target is send:
            value = node.args[0]
            self.sent[key] = self.kinds[value] if value in self.needs else None
        flag = argument(node, 4 if node.target is send else 5, "gradient", False)
        if flag is not (self.sent[key] is not None):
            self._fail(
                node,
                "says that no gradient comes back, and the loss depends on parameters through it" if not flag else
                "says that a gradient comes back, and no parameter is behind it",
            )  # fmt: skip
        if node.target is recv and flag:
            kind = self.sent[key]
            assert kind is not None
            self.kinds[node] = kind

    def _exchange(self, node: Node) -> None:
        value: Any = node.args[0]
        kind = self.kinds[value]
        wants, gives = {
            all_reduce: (PARTIAL, WHOLE), all_gather: (TERMS, WHOLE), copy_to_tp: (WHOLE, TERMS),
            one_gradient: (TERMS, WHOLE), one_term: (WHOLE, PARTIAL),
        }[node.target]  # fmt: skip
        if self._is_parameter(value) and kind == WHOLE:
            self._note(str(value.target), wants == TERMS, node)
        elif self._is_parameter(value):
            self._note(str(value.target), True, node)
        elif kind != wants:
            self._fail(node, f"of {value.name}, {_MEANING[kind]}: {_CONSEQUENCE[node.target]}")
        if node.target is copy_to_tp:
            if argument(node, 1, "axis") != "tp" or self.facts.program.mesh.tp == 1:
                self._fail(node, f"no axis {argument(node, 1, 'axis')!r} to add gradients up along")
            own = self.facts.values[node]
            assert isinstance(own, Value)
            self.copies.append((node, own.ref))
        if node.target is one_gradient and argument(node, 1, "tp_rank") != self.facts.program.tp_rank:
            self._fail(node, f"gives the gradient to this rank as to rank {argument(node, 1, 'tp_rank')}")
        self.kinds[node] = gives

    def _op(self, node: Node) -> None:
        inputs = [a for a in node.all_input_nodes if a in self.needs]
        values = _each(self.facts.values[node])
        given = {self.kinds[a] for a in inputs if not self._is_parameter(a)}
        if values[0].ref.op in self.in_parts:
            for a in inputs:
                if not self._is_parameter(a) and self.kinds[a] == WHOLE:
                    self._fail(
                        node,
                        f"reads the whole of {self._named(a)} and computes a part: each rank has a term of "
                        "its gradient, and nothing adds them up (copy_to_tp)",
                    )
            terms, kind = True, PARTIAL if any(v.held.partial for v in values) else TERMS
        else:
            if len(given) > 1:
                one, other = (next(a for a in inputs if self.kinds[a] == k) for k in (TERMS, WHOLE))
                self._fail(
                    node,
                    f"reads {one.name}, of whose gradient each rank is to have a term, beside {other.name}, whose "
                    f"gradient is whole: the sum over tp would count it {self.facts.program.mesh.tp} times",
                )
            kind = given.pop() if given else WHOLE
            terms = kind == TERMS
        for a in inputs:
            if self._is_parameter(a):
                self._note(str(a.target), terms, node)
        for path in own_parameters(self.facts.program.graph_module, node):
            self._note(path, terms, node)
        self.kinds[node] = kind

    def _piece(self, node: Node) -> None:
        for a in node.all_input_nodes:
            if self._is_parameter(a):
                self._note(str(a.target), True, node)
            elif a in self.needs and self.kinds[a] == WHOLE:
                self._fail(
                    node,
                    f"takes a piece of the whole {self._named(a)}: each rank has a part of its gradient, "
                    "and nothing adds them up (copy_to_tp)",
                )
        self.kinds[node] = TERMS

    def tensors(self) -> Tensors:
        """Returns {first path of a parameter that gradients come to: whether a term comes}. One tensor is of one
        kind."""
        program = self.facts.program
        found: Tensors = {}
        first: dict[int, str] = {}
        readers: dict[str, Node] = {}
        for path, parameter in program.graph_module.named_parameters(remove_duplicate=False):
            for terms, node in self.uses.get(path, {}).items():
                name = first.setdefault(id(parameter), path)
                if found.setdefault(name, terms) is not terms:
                    self._fail(
                        node,
                        f"gives {'a term' if terms else 'the whole'} of the gradient of {name}, and "
                        f"{readers[name].name} does otherwise: no sum over ranks is right for both",
                    )
                readers.setdefault(name, node)
        return found


_CONSEQUENCE = {
    copy_to_tp: "the gradient would be added up over tp twice, and be counted many times",
    one_gradient: "all ranks but the first would lose it",
    all_reduce: "nothing is owed",
    all_gather: "each rank would take a part of it",
    one_term: "each rank would have all of it",
}


def _check_copies(readers: Sequence[_Reader]) -> None:
    """Checks that the ranks of a stage come to the same sums backward, in the same order: the reverse of this one."""
    first = readers[0]
    for reader in readers[1:]:
        for (theirs, a), (mine, b) in zip(first.copies, reader.copies, strict=False):
            if a != b:
                fail(
                    reader.facts.program, mine,
                    f"adds up the gradient of {named(b)}, where rank {first.facts.program.rank} adds up that of "
                    f"{named(a)} ({theirs.name})",
                )  # fmt: skip
            if (theirs in first.used) != (mine in reader.used):
                idle, other = (first, reader) if mine in reader.used else (reader, first)
                fail(
                    idle.facts.program, theirs if idle is first else mine,
                    f"nothing that leaves this rank is made of it, and rank {other.facts.program.rank} adds up its "
                    "gradient: the ranks would hang",
                )  # fmt: skip
        if len(reader.copies) != len(first.copies):
            longer, other = (reader, first) if len(reader.copies) > len(first.copies) else (first, reader)
            node = longer.copies[len(other.copies)][0]
            fail(
                longer.facts.program, node,
                f"rank {other.facts.program.rank} never adds up this gradient: the ranks would hang",
            )  # fmt: skip
