"""Expert parallelism: finds alike experts in the op graph, and the placements by which each lies whole on one tp rank.

Experts are found by structure, not by name. Where terms are added to one tensor one after the other (a chain of
index_add), or rows are joined (join_rows), all ops that only one term needs are its *body*: the choice of its tokens,
its linears, their weights. Bodies that are alike (same kinds, shapes and ties) are siblings, dealt to the ranks in
order, as evenly as whole ones allow. A body then lies O(rank), and the sum is owed (P): its other terms are on other
ranks.

    index_add_(out, tokens_0, expert_0(x[tokens_0])); index_add_(out, tokens_1, expert_1(x[tokens_1])); ...

Where one tensor holds the weights of all experts, it is followed from the piece that each body reads (a slice, a part
of a split) back to the parameter, element by element (expert_weights.py): it lies D(dim), with the elements of a rank's
experts on that rank.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cost_model.graph.op_graph import Op, OpGraph, TensorRef
from cost_model.graph.placement import PARTIAL, REPLICATE, Layout, owned
from cost_model.layouts.expert_weights import Way, WholeWeights
from cost_model.rules.table import RuleTable

_ADDS = ("index_add",)
_JOINS = ("join_rows",)


@dataclass(slots=True)
class _Body:
    """One expert: `ops` run for its term alone; `link` is the index_add that adds the term, None for joined rows."""

    ops: set[str]
    link: Op | None


@dataclass(frozen=True, slots=True)
class Siblings:
    """The number of alike experts of a layer, and of those on the fullest rank."""

    count: int
    most: int

    @property
    def share(self) -> float:
        """The fullest rank's share of the experts, 0.0 to 1.0."""
        return self.most / self.count


@dataclass(slots=True)
class ExpertTable:
    """The placements of all ops that change when experts are dealt whole to the ranks."""

    ways: dict[str, Way] = field(default_factory=dict)  # op or parameter -> its placements
    layouts: dict[tuple[TensorRef, int], Layout] = field(default_factory=dict)  # of tensors in D(dim), by (tensor, dim)
    siblings: dict[str, Siblings] = field(default_factory=dict)  # op or parameter that lies on one rank -> its group
    twins: dict[str, str] = field(default_factory=dict)  # op of an expert -> the same op of its layer's first expert


def find_experts(graph: OpGraph, tp: int, rules: RuleTable) -> ExpertTable:
    """Returns the table of all experts of a graph; an empty one for tp=1.

    Siblings that cannot be dealt (there are fewer than ranks, say) have twins and no ways.
    """
    table = ExpertTable()
    if tp == 1:
        return table
    finder = _Finder(graph, tp, rules, table)
    for links in _chains(graph):
        bodies = [_Body(finder.body(link.inputs[1:], {link.name}), link) for link in links]
        for siblings in finder.alike(bodies):
            finder.deal(siblings)
    for op in graph:
        if op.kind in _JOINS:
            bodies = [_Body(finder.body((ref,), {op.name}), None) for ref in op.inputs[:-1]]
            groups = finder.alike(bodies)
            if len(groups) == 1 and len(groups[0]) == len(bodies):
                finder.deal(bodies, op)
    return table


def _chains(graph: OpGraph) -> list[list[Op]]:
    """Returns the chains of index_add: each op adds a term to the result of the one before, its only reader."""
    found: dict[str, list[Op]] = {}  # by the last link
    outputs = {ref.op for ref in graph.outputs}
    for op in graph:
        if op.kind not in _ADDS:
            continue
        before = op.inputs[0]
        alone = len(graph.users[before]) == 1 and before.op not in outputs
        found[op.name] = [*(found.pop(before.op, []) if alone else []), op]
    return list(found.values())


class _Finder:
    def __init__(self, graph: OpGraph, tp: int, rules: RuleTable, table: ExpertTable) -> None:
        self.graph, self.tp, self.rules, self.table = graph, tp, rules, table
        self.outputs = {ref.op for ref in graph.outputs}
        self.users: dict[str, set[str]] = {}
        for op in graph:
            for used in (*(ref.op for ref in op.inputs), *op.numbers):
                self.users.setdefault(used, set()).add(op.name)
        self.positions = {name: i for i, name in enumerate(graph.ops)}
        self.signatures: dict[object, int] = {}

    # -- bodies ----------------------------------------------------------------------------------------------------

    def body(self, refs: Iterable[TensorRef], inside: set[str]) -> set[str]:
        """Returns the ops and parameters upstream of `refs` that nothing reads but ops `inside` and one another."""
        found: set[str] = set()
        pending = [ref.op for ref in refs]
        while pending:
            op = self.graph[pending.pop()]
            if op.name in found or op.kind in ("input", "buffer") or op.mutates or op.name in self.outputs:
                continue
            if not self.users[op.name] <= inside | found:
                continue  # something else reads it; or it is pushed again when its last reader has been found
            found.add(op.name)
            pending += [*(ref.op for ref in op.inputs), *op.numbers]
        return found

    def alike(self, bodies: Sequence[_Body]) -> list[list[_Body]]:
        """Groups bodies that are alike; leaves out groups whose bodies share an op."""
        groups: dict[int, list[_Body]] = {}
        for body in bodies:
            if body.ops:
                groups.setdefault(self._signature(body), []).append(body)
        return [g for g in groups.values() if len({op for b in g for op in b.ops}) == sum(len(b.ops) for b in g)]

    def _signature(self, body: _Body) -> int:
        """Returns a number that is equal for bodies with the same ops on the same shapes, tied in the same way."""
        known: dict[str, int] = {}
        order = self._in_order(body.ops)
        for number, op in enumerate(order):
            known[op.name] = number
        text = tuple(
            (
                op.kind,
                tuple((o.dtype, tuple(_dim(n, s) for n, s in zip(o.shape, o.symbols or ("",) * len(o.shape))))
                      for o in op.outputs),
                tuple((known.get(ref.op, -1), ref.index if ref.op in known else 0) for ref in op.inputs),
            )
            for op in order
        )  # fmt: skip
        return self.signatures.setdefault(text, len(self.signatures))

    def _in_order(self, names: set[str]) -> list[Op]:
        """Returns the ops in execution order, each parameter in front of its first reader: alike for siblings."""
        found: dict[str, Op] = {}
        for name in sorted((n for n in names if self.graph[n].kind != "param"), key=self.positions.__getitem__):
            for ref in self.graph[name].inputs:
                if ref.op in names:
                    found.setdefault(ref.op, self.graph[ref.op])
            found[name] = self.graph[name]
        return list(found.values())

    # -- dealing -----------------------------------------------------------------------------------------------------

    def deal(self, bodies: Sequence[_Body], join: Op | None = None) -> None:
        """Notes the placements of all tensors of the bodies when they are dealt to the ranks in order.

        Notes twins only where there are fewer bodies than ranks, no matmul weight is among them, or gradients would not
        reach all ranks (`_read_alike`). `join` is the join_rows that collects the terms, if there is one.
        """
        first, *others = [self._in_order(body.ops) for body in bodies]
        for order in others:
            self.table.twins.update((op.name, twin.name) for op, twin in zip(order, first, strict=True))
        links = [body.link.name for body in bodies if body.link is not None]
        # All but the last link, whose result other ops read in placements of their own.
        self.table.twins.update((name, links[0]) for name in links[1:-1])
        if len(bodies) < self.tp:
            return
        share, extra = divmod(len(bodies), self.tp)
        rank_of = [r for r in range(self.tp) for _ in range(share + (r < extra))]
        owner = {name: r for body, r in zip(bodies, rank_of, strict=True) for name in body.ops}
        weights = WholeWeights(self.graph, self.rules, self.tp, owner)
        if not weights.ways and not any(self.graph[name].attrs.get("matmul") for name in owner):
            return
        if not self._read_alike(bodies, weights):
            return
        siblings = Siblings(len(bodies), share + (extra > 0))
        self.table.ways.update(weights.ways)
        self.table.layouts.update(weights.layouts)
        for name, rank in owner.items():
            op, on_rank = self.graph[name], owned(rank)
            placements = tuple(weights.read_as.get(ref, on_rank) for ref in op.inputs)
            self.table.ways[name] = Way(placements, (on_rank,) * len(op.outputs))
            self.table.siblings[name] = siblings
        for body, rank in zip(bodies, rank_of, strict=True):
            if body.link is not None:
                self.table.ways[body.link.name] = Way((PARTIAL, owned(rank), owned(rank)), (PARTIAL,))
                self.table.siblings[body.link.name] = siblings
        if join is not None:
            self.table.ways[join.name] = Way((*(owned(r) for r in rank_of), REPLICATE), (PARTIAL,))

    def _read_alike(self, bodies: Sequence[_Body], weights: WholeWeights) -> bool:
        """True if every rank, whichever experts it has, reads every tensor with a gradient that some expert reads.

        In the backward pass each reader has a term of the tensor's gradient, and the ranks sum the terms by a
        collective, from which a rank that read nothing would be missing. Every rank reads a tensor that every expert
        reads, or one that is split for the experts alone, a piece for each.
        """
        inside = {name for body in bodies for name in body.ops} | {b.link.name for b in bodies if b.link is not None}
        times: Counter[TensorRef] = Counter()  # tensor -> number of experts that read it
        times_any: Counter[str] = Counter()  # op -> number of experts that read some output of it
        for body in bodies:
            added = () if body.link is None else body.link.inputs[1:]
            read = {*added, *(ref for name in body.ops for ref in self.graph[name].inputs)}
            times.update(outside := {ref for ref in read if ref.op not in body.ops})
            times_any.update({ref.op for ref in outside})

        def reaches_all(ref: TensorRef) -> bool:
            in_pieces = times_any[ref.op] == len(bodies) and self.users[ref.op] <= inside
            return times[ref] == len(bodies) or (in_pieces and not weights.parameter_of(ref))

        return all(
            reaches_all(ref) or ref.op in weights.ways or not self._bears_gradients(ref) for ref in times
        )

    def _bears_gradients(self, ref: TensorRef) -> bool:
        """True if a gradient can reach the tensor: it is floating point, and no input or buffer."""
        constant = self.graph[ref.op].kind in ("input", "buffer")
        return not constant and not self.graph.spec(ref).dtype.startswith(("int", "uint", "bool"))


def _dim(size: int, symbol: str) -> int | str:
    """Returns the part of a dim that must be equal in alike experts: a constant length, or a size symbol; of a symbol
    "?7~B*S/4" the expected "B*S/4" only, since each expert has its own number of rows."""
    return symbol[symbol.find("~") + 1 :] if symbol else size


def busiest_share(siblings: Siblings, rows: float, tp: int) -> float:
    """Returns the share of all rows that the busiest rank is expected to have, if each of `siblings` gets `rows`.

    m rows thrown into n ranks: the fullest has about m/n + sqrt(2 m/n ln n) (M. Raab, A. Steger, "Balls into bins - a
    simple and tight analysis", 1998).
    """
    total = siblings.count * rows
    mean = total * siblings.share
    return min(1.0, (mean + math.sqrt(2 * mean * math.log(tp))) / total) if total else siblings.share
