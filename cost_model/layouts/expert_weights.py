"""Weights of all experts in one tensor, followed from what each expert reads of it back to the parameter.

    w [4*f, h] -> view [4, f, h] -> split -> [1, f, h], ...        each part is read by one expert alone
    w [4, f, h] -> w[0], w[1], ...

Each element along one dim of each tensor on that way then belongs to one expert, hence to its rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cost_model.graph.op_graph import Op, OpGraph, TensorRef
from cost_model.graph.placement import Layout, Placement, dealt, intervals_of, owned
from cost_model.rules.rule import DimLink, IntArray
from cost_model.rules.table import RuleTable

# What experts' weights may be read through before each expert's part is taken.
_THROUGH = ("view", "permute", "to", "identity")
_NOBODY = -1


@dataclass(frozen=True, slots=True)
class Way:
    """How an op's tensors lie when experts are dealt whole."""

    inputs: tuple[Placement, ...]
    outputs: tuple[Placement, ...]


@dataclass(frozen=True, slots=True)
class _Dealt:
    """Of each element along `dim`, the tp rank whose expert reads it."""

    dim: int
    ranks: IntArray


class WholeWeights:
    """`owner` maps the ops of all experts of a layer to their tp rank.

    `ways` and `layouts` are of the parameters and of what stands between them and the experts; `read_as` says how a
    tensor lies that an expert picks its own element from.
    """

    def __init__(self, graph: OpGraph, rules: RuleTable, tp: int, owner: Mapping[str, int]) -> None:
        self.graph, self.rules, self.tp, self.owner = graph, rules, tp, owner
        self.ways: dict[str, Way] = {}
        self.layouts: dict[tuple[TensorRef, int], Layout] = {}
        self.read_as: dict[TensorRef, Placement] = {}
        for name in dict.fromkeys(self.parameter_of(ref) for op in owner for ref in graph[op].inputs):
            if name and name not in owner:
                self._follow(name)

    def parameter_of(self, ref: TensorRef) -> str:
        """What `ref` is a part of or a view of; "" where that is no parameter."""
        op = self.graph[ref.op]
        while op.kind in (*_THROUGH, "split") and op.name not in self.owner:
            op = self.graph[op.inputs[0].op]
        return op.name if op.kind == "param" else ""

    def _follow(self, name: str) -> None:
        """Notes nothing where something else reads the parameter too, or an expert reads what others read."""
        claims: dict[TensorRef, list[_Dealt]] = {}
        tensors, through, parts = [TensorRef(name)], list[Op](), dict[str, tuple[int, ...]]()
        for ref in tensors:  # grows
            for user, _ in self.graph.users.get(ref, ()):
                op = self.graph[user]
                claim = self._picked(ref, op) if user in self.owner else None
                if op.kind == "split" and user not in self.owner:
                    parts[user] = tuple(self._reader(TensorRef(user, j)) for j in range(len(op.outputs)))
                    lengths = [o.shape[op.attrs["dim"]] for o in op.outputs]
                    claim = _Dealt(op.attrs["dim"], np.repeat(np.array(parts[user], dtype=np.int64), lengths))
                elif op.kind in _THROUGH and user not in self.owner:
                    through.append(op)
                    tensors.append(TensorRef(user))
                    continue
                if claim is None:
                    return
                claims.setdefault(ref, []).append(claim)
        dealt_as: dict[TensorRef, _Dealt] = {}
        for ref in reversed(tensors):
            for op in through:
                if op.inputs[0] == ref:
                    back = self._before(op, dealt_as[TensorRef(op.name)])
                    if back is None:
                        return
                    claims.setdefault(ref, []).append(back)
            together = _together(claims.get(ref, []))
            if together is None:
                return
            dealt_as[ref] = together
        for ref, lies in dealt_as.items():
            parts_of = tuple(intervals_of(np.flatnonzero(lies.ranks == r).tolist()) for r in range(self.tp))
            self.layouts[ref, lies.dim] = Layout(len(lies.ranks), parts_of)
            self.read_as[ref] = dealt(lies.dim)
        self.ways[name] = Way((), (self.read_as[TensorRef(name)],))
        for op in through:
            self.ways[op.name] = Way((self.read_as[op.inputs[0]],), (self.read_as[TensorRef(op.name)],))
        for user, ranks in parts.items():
            self.ways[user] = Way((self.read_as[self.graph[user].inputs[0]],), tuple(map(owned, ranks)))

    def _picked(self, ref: TensorRef, op: Op) -> _Dealt | None:
        """x[3], read by an expert: element 3 is its own."""
        picks: tuple[tuple[int, int], ...] = op.attrs.get("picks", ()) if op.kind == "slice" else ()
        if len(picks) != 1:
            return None
        dim, index = picks[0]
        ranks = np.full(self.graph.spec(ref).shape[dim], _NOBODY, dtype=np.int64)
        ranks[index] = self.owner[op.name]
        return _Dealt(dim, ranks)

    def _reader(self, ref: TensorRef) -> int:
        """The one rank whose experts read a part of a split."""
        ranks = {self.owner.get(user, _NOBODY) for user, _ in self.graph.users.get(ref, ())}
        return ranks.pop() if len(ranks) == 1 else _NOBODY

    def _before(self, op: Op, after: _Dealt) -> _Dealt | None:
        """How the input of `op` lies whose output lies as `after`."""
        for factor in self.rules(op, self.graph.input_specs(op)).factors:
            out = next((x for x in factor.outputs if x.dim == after.dim), None)
            of_factor = None if out is None else _through(factor.size, after.ranks, out)
            if of_factor is not None and len(factor.inputs) == 1:
                source = factor.inputs[0]
                ranks = of_factor
                if source.pairs is not None:
                    ranks = np.full(self.graph.spec(op.inputs[0]).shape[source.dim], _NOBODY, dtype=np.int64)
                    ranks[source.pairs[0]] = of_factor[source.pairs[1]]
                return _Dealt(source.dim, ranks)
        return None


def _through(size: int, ranks: IntArray, link: DimLink) -> IntArray | None:
    """The rank of each coordinate of a factor; None where a coordinate is on several."""
    if link.pairs is None:
        return ranks
    found = np.full(size, _NOBODY, dtype=np.int64)
    found[link.pairs[1]] = ranks[link.pairs[0]]
    return found if np.array_equal(found[link.pairs[1]], ranks[link.pairs[0]]) else None


def _together(claims: list[_Dealt]) -> _Dealt | None:
    """All claims as one; None where they speak of several dims, or leave or give an element twice."""
    if len({claim.dim for claim in claims}) != 1:
        return None
    ranks = np.full_like(claims[0].ranks, _NOBODY)
    for claim in claims:
        own = claim.ranks != _NOBODY
        if (ranks[own] != _NOBODY).any() and not np.array_equal(ranks[own], claim.ranks[own]):
            return None
        ranks[own] = claim.ranks[own]
    return None if (ranks == _NOBODY).any() else _Dealt(claims[0].dim, ranks)
