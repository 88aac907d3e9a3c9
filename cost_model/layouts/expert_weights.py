"""Follows a parameter that holds the weights of all experts, from the piece that each expert reads back to it.

    w [4*f, h] -> view [4, f, h] -> split -> [1, f, h], ...        each part is read by one expert alone
    w [4, f, h] -> w[0], w[1], ...                                 (4 experts of f features, h hidden)

Each element along one dim of each tensor between the experts and the parameter then belongs to one expert, hence to
the tp rank that has the expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cost_model.graph.op_graph import Op, OpGraph, TensorRef
from cost_model.graph.placement import Layout, Placement, dealt, intervals_of, owned
from cost_model.rules.rule import DimLink, IntArray
from cost_model.rules.table import RuleTable

# Kinds of op that experts' weights may be read through before each expert's part is taken.
_THROUGH = ("view", "permute", "to", "identity")
_NOBODY = -1  # in place of a tp rank


@dataclass(frozen=True, slots=True)
class Way:
    """The placements of an op's inputs and outputs when experts are dealt whole."""

    inputs: tuple[Placement, ...]
    outputs: tuple[Placement, ...]


@dataclass(frozen=True, slots=True)
class _Dealt:
    """An assignment of the elements along `dim` to tp ranks: `ranks[i]` has the expert that reads element i."""

    dim: int
    ranks: IntArray


class WholeWeights:
    """The placements of parameters that hold the weights of all experts of a layer, and of the ops between them and
    the experts.

    `owner` maps the ops of all these experts to their tp rank. `ways` has the placements of those ops and parameters,
    `layouts` the layouts of their tensors, and `read_as` the placement in which each of these tensors is read.
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
        """Returns the name of the parameter that `ref` is a part of, or a view of; "" if it is of none."""
        op = self.graph[ref.op]
        while op.kind in (*_THROUGH, "split") and op.name not in self.owner:
            op = self.graph[op.inputs[0].op]
        return op.name if op.kind == "param" else ""

    def _follow(self, name: str) -> None:
        """Notes the placements of parameter `name` and of the ops between it and the experts.

        Notes nothing where something else reads the parameter too, or where an expert reads what others read.
        """
        # First forward, from the parameter through views: each reader claims elements. Then backward: the claims on
        # each tensor are merged and handed on, through the view that made it, to the tensor in front.
        claims: dict[TensorRef, list[_Dealt]] = {}
        tensors, views, part_ranks = [TensorRef(name)], list[Op](), dict[str, tuple[int, ...]]()
        for ref in tensors:  # grows while it is walked
            for user, _ in self.graph.users.get(ref, ()):
                op = self.graph[user]
                claim = self._picked(ref, op) if user in self.owner else None
                if op.kind == "split" and user not in self.owner:
                    part_ranks[user] = tuple(self._reader(TensorRef(user, j)) for j in range(len(op.outputs)))
                    lengths = [o.shape[op.attrs["dim"]] for o in op.outputs]
                    claim = _Dealt(op.attrs["dim"], np.repeat(np.array(part_ranks[user], dtype=np.int64), lengths))
                elif op.kind in _THROUGH and user not in self.owner:
                    views.append(op)
                    tensors.append(TensorRef(user))
                    continue
                if claim is None:
                    return
                claims.setdefault(ref, []).append(claim)
        dealt_as: dict[TensorRef, _Dealt] = {}
        for ref in reversed(tensors):
            for op in views:
                if op.inputs[0] == ref:
                    at_input = self._before(op, dealt_as[TensorRef(op.name)])
                    if at_input is None:
                        return
                    claims.setdefault(ref, []).append(at_input)
            merged = _together(claims.get(ref, []))
            if merged is None:
                return
            dealt_as[ref] = merged
        for ref, assignment in dealt_as.items():
            parts_of = tuple(intervals_of(np.flatnonzero(assignment.ranks == r).tolist()) for r in range(self.tp))
            self.layouts[ref, assignment.dim] = Layout(len(assignment.ranks), parts_of)
            self.read_as[ref] = dealt(assignment.dim)
        self.ways[name] = Way((), (self.read_as[TensorRef(name)],))
        for op in views:
            self.ways[op.name] = Way((self.read_as[op.inputs[0]],), (self.read_as[TensorRef(op.name)],))
        for user, ranks in part_ranks.items():
            self.ways[user] = Way((self.read_as[self.graph[user].inputs[0]],), tuple(map(owned, ranks)))

    def _picked(self, ref: TensorRef, op: Op) -> _Dealt | None:
        """Returns the claim of an expert's x[3], which is element 3 along that dim; None for any other op."""
        picks: tuple[tuple[int, int], ...] = op.attrs.get("picks", ()) if op.kind == "slice" else ()
        if len(picks) != 1:
            return None
        dim, index = picks[0]
        ranks = np.full(self.graph.spec(ref).shape[dim], _NOBODY, dtype=np.int64)
        ranks[index] = self.owner[op.name]
        return _Dealt(dim, ranks)

    def _reader(self, ref: TensorRef) -> int:
        """Returns the rank whose experts alone read `ref`, a part of a split; _NOBODY if others read it, too."""
        ranks = {self.owner.get(user, _NOBODY) for user, _ in self.graph.users.get(ref, ())}
        return ranks.pop() if len(ranks) == 1 else _NOBODY

    def _before(self, op: Op, after: _Dealt) -> _Dealt | None:
        """Returns the assignment of the input of `op` that makes its output lie as `after`; None if there is none."""
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
    """Returns the rank of each of `size` coordinates of a factor, by the ranks of the elements of a dim that `link`
    ties to it; None where a coordinate is on several ranks."""
    if link.pairs is None:
        return ranks
    found = np.full(size, _NOBODY, dtype=np.int64)
    found[link.pairs[1]] = ranks[link.pairs[0]]
    return found if np.array_equal(found[link.pairs[1]], ranks[link.pairs[0]]) else None


def _together(claims: list[_Dealt]) -> _Dealt | None:
    """Merges claims on one tensor; None if they are of several dims, leave an element out, or give it to two ranks."""
    if len({claim.dim for claim in claims}) != 1:
        return None
    ranks = np.full_like(claims[0].ranks, _NOBODY)
    for claim in claims:
        own = claim.ranks != _NOBODY
        if (ranks[own] != _NOBODY).any() and not np.array_equal(ranks[own], claim.ranks[own]):
            return None
        ranks[own] = claim.ranks[own]
    return None if (ranks == _NOBODY).any() else _Dealt(claims[0].dim, ranks)
