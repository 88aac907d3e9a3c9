"""Layouts of all dims, the elements that each tp rank would hold, for the whole graph before any strategy is chosen.

The factors of the op rules tie dims of different tensors together: the outputs of q_proj, the heads after the view, the
attention's output, the inputs of o_proj. Followed element by element, these ties say what may not be cut apart: all
64 outputs of one head, and with grouped attention the query heads of one KV head. Such a smallest piece is a *grain*;
grains are dealt to the ranks in order, as evenly as whole grains allow. Because elements are followed, it makes no
difference whether q, k and v are three weights or one, in thirds or interleaved per head or per group.

Where grouped attention leaves fewer grains than ranks (2 KV heads on 4 ranks), the tie between a KV head and its query
heads is loosened: query heads are dealt out, and each rank holds the KV heads that its query heads read.

Every (tensor, dim) gets one layout or none, so that in the search a placement S(dim) says all there is to say.

Two kinds of tie are kept apart, since most are trivial. Dims that correspond element by element are merged by
union-find into one, known by its *root*; only the others (a view that splits a dim, a slice, grouped heads) become
relations with arrays of element pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import networkx as nx

from cost_model.graph.op_graph import Op, OpGraph, TensorRef
from cost_model.graph.placement import Layout
from cost_model.layouts.grains import deal_grains
from cost_model.rules.rule import Factor, IntArray, OpRule
from cost_model.rules.table import RuleTable

Dim = tuple[TensorRef, int]
_UNSEEN = Layout(0, ())  # for dims that were never dealt, apart from those dealt whole, which have None


@dataclass(slots=True)
class _Relation:
    """A tie of two dims: element `pairs[0][i]` of `a` belongs with element `pairs[1][i]` of `b`, a factor's coordinate.

    `cover` as in DimLink.
    """

    a: Dim
    b: Dim
    pairs: tuple[IntArray, IntArray]
    cover: bool


class LayoutTable:
    """The layout of every shardable dim on `tp` ranks, and the factors along which each op can be sharded."""

    def __init__(self, graph: OpGraph, tp: int, rules: RuleTable | None = None) -> None:
        self.graph = graph
        self.tp = tp
        self.rules = rules or RuleTable()
        self._layouts: dict[Dim, Layout | None] = {}
        self._factors: dict[str, tuple[Factor, ...]] = {}
        self._carries_weight: dict[Dim, bool] = {}
        self._parents: dict[Dim, Dim] = {}
        self._made_up_sizes: dict[Dim, int] = {}
        self._solve()

    def layout(self, ref: TensorRef, dim: int) -> Layout | None:
        """Returns the layout of `ref` along `dim`; None if every rank would hold the whole dim."""
        root = self._find((ref, dim))
        return self._layouts.get(root)

    def is_kept_whole(self, ref: TensorRef) -> bool:
        """True if some dim (of more than one element) is whole on every rank although its op could be sharded along
        it: the projections of a single KV head, which every rank's query heads read."""
        shape = self.graph.spec(ref).shape
        return any(n > 1 and self._layouts.get(self._find((ref, d)), _UNSEEN) is None for d, n in enumerate(shape))

    def factors(self, op: Op) -> tuple[Factor, ...]:
        """Returns the op's factors that can be sharded and are tied to some matmul's weight."""
        return self._factors[op.name]

    # -- dims that are the same, element by element: union-find ------------------------------------------------------

    def _find(self, dim: Dim) -> Dim:
        """Returns the root of the set of dims that are the same as `dim`."""
        parents = self._parents
        root = dim
        while (up := parents.get(root, root)) != root:
            root = up
        while dim != root:  # path compression
            up = parents.get(dim, dim)
            parents[dim] = root
            dim = up
        return root

    def _union(self, a: Dim, b: Dim) -> None:
        a, b = self._find(a), self._find(b)
        if a != b:
            self._parents[b] = a

    # -- the three steps -------------------------------------------------------------------------------------------

    def _solve(self) -> None:
        """Merges dims that are the same, chooses among alternative factors, deals grains, keeps the useful factors."""
        rules: dict[str, OpRule] = {}
        static: dict[str, list[Factor]] = {}
        for op in self.graph:
            rules[op.name] = self.rules(op, self.graph.input_specs(op))
            static[op.name] = [
                x
                for x in rules[op.name].factors
                if not self._is_dynamic(op, x) and (x.size >= self.tp or not x.filled)
            ]
            for factor in static[op.name]:
                self._tie_identical(op, factor)
        blocked = self._blocked_dims(rules)
        relations: list[_Relation] = []
        for op in self.graph:
            static[op.name] = self._choose_alternatives(op, static[op.name], blocked)
            for factor in static[op.name]:
                relations += self._relations(op, factor)
        self._deal(relations)
        for op in self.graph:
            self._factors[op.name] = tuple(x for x in static[op.name] if self._is_useful(op, x))

    def _dims(self, op: Op, factor: Factor) -> Iterable[tuple[Dim, bool]]:
        """Yields each dim that the factor runs through, and whether the dim equals the factor element by element."""
        for link in factor.inputs:
            yield (op.inputs[link.slot], link.dim), link.pairs is None
        for link in factor.outputs:
            yield (TensorRef(op.name, link.slot), link.dim), link.pairs is None

    def _is_dynamic(self, op: Op, factor: Factor) -> bool:
        return any(self.graph.spec(ref).is_dynamic(dim) for (ref, dim), _ in self._dims(op, factor))

    def _anchor(self, op: Op, factor: Factor) -> Dim:
        """Returns a dim that stands for the factor's coordinate: one that equals it, or one made up, of index -1."""
        for dim, identical in self._dims(op, factor):
            if identical:
                return dim
        return (TensorRef(f"{op.name}/{factor.name}", -1), 0)

    def _tie_identical(self, op: Op, factor: Factor) -> None:
        anchor = self._anchor(op, factor)
        for dim, identical in self._dims(op, factor):
            if identical:
                self._union(anchor, dim)

    def _blocked_dims(self, rules: dict[str, OpRule]) -> set[Dim]:
        """Returns the roots of dims that some op touches without a factor for them: there, sharded, they would have to
        be gathered."""
        blocked: set[Dim] = set()
        dropped: set[Dim] = set()  # roots of such dims of one element, which a squeeze takes away, say
        for op in self.graph:
            named: set[Dim] = set()
            for factor in rules[op.name].factors:
                named.update(dim for dim, _ in self._dims(op, factor))
            for ref in (*op.inputs, *(TensorRef(op.name, j) for j in range(len(op.outputs)))):
                for d, size in enumerate(self.graph.spec(ref).shape):
                    if (ref, d) not in named and op.inputs:
                        (blocked if size > 1 else dropped).add(self._find((ref, d)))
        for op in self.graph:
            for factor in rules[op.name].factors:
                pieces = [(TensorRef(op.name, x.slot), x.dim) for x in factor.outputs if x.pairs is not None]
                if any(self.graph.spec(ref).shape[d] == 1 and self._find((ref, d)) in dropped for ref, d in pieces):
                    # The dim is cut into single elements and then goes (one expert's weight of all): each element is
                    # wanted whole where it is read.
                    blocked.update(self._find((op.inputs[x.slot], x.dim)) for x in factor.inputs)
        return blocked

    def _choose_alternatives(self, op: Op, factors: list[Factor], blocked: set[Dim]) -> list[Factor]:
        """Keeps at most one of the factors of each split or merged dim: the outermost that no op blocks.

        A factor of size 1 (the head dim of multi-query attention) counts when the others are blocked: it keeps the
        dim in one piece, where otherwise each rank would compute a part and gather it at once.
        """
        chosen = [x for x in factors if not x.alternatives]
        for group in dict.fromkeys(x.alternatives for x in factors if x.alternatives):
            free = [
                x
                for x in factors
                if x.alternatives == group
                and not any(self._find(dim) in blocked for dim, identical in self._dims(op, x) if identical)
            ]
            best = next((x for x in free if x.size > 1), None) or next(iter(free), None)
            if best is not None:
                chosen.append(best)
        return chosen

    def _relations(self, op: Op, factor: Factor) -> list[_Relation]:
        """Returns the ties of the factor's anchor to the dims that do not equal it element by element."""
        anchor = self._anchor(op, factor)
        found = []
        for link in factor.inputs:
            if link.pairs is not None:
                found.append(_Relation((op.inputs[link.slot], link.dim), anchor, link.pairs, link.cover))
        for link in factor.outputs:
            if link.pairs is not None:
                found.append(_Relation((TensorRef(op.name, link.slot), link.dim), anchor, link.pairs, link.cover))
        if anchor[0].index < 0:  # made up: its size is not any tensor's
            self._made_up_sizes[self._find(anchor)] = factor.size
        return found

    def _size(self, root: Dim) -> int:
        """Returns the number of elements of a dim, which may be one made up for a factor."""
        made_up = self._made_up_sizes.get(root)
        return made_up if made_up is not None else self.graph.spec(root[0]).shape[root[1]]

    def _deal(self, relations: list[_Relation]) -> None:
        """Deals the grains of each set of dims that relations connect to the ranks."""
        ties: nx.Graph[Dim] = nx.Graph()
        weights = [op for op in self.graph if op.kind == "param"]
        for op in weights:
            for d in range(len(op.outputs[0].shape)):
                ties.add_node(self._find((TensorRef(op.name), d)))
        by_root: dict[Dim, list[_Relation]] = {}
        for relation in relations:
            a, b = self._find(relation.a), self._find(relation.b)
            ties.add_edge(a, b)
            by_root.setdefault(a, []).append(relation)
        matmul_roots = {
            self._find((TensorRef(op.name), d))
            for op in weights
            if op.attrs.get("matmul")
            for d in range(len(op.outputs[0].shape))
        }
        solved: dict[tuple[object, ...], list[Layout | None]] = {}
        order = {root: i for i, root in enumerate(ties)}
        for component in nx.connected_components(ties):
            roots = sorted(component, key=order.__getitem__)
            carries = any(root in matmul_roots for root in roots)
            for root in roots:
                self._carries_weight[root] = carries
            if not carries:
                continue  # no matmul's weight is among the dims: nothing is won by sharding them
            position = {root: i for i, root in enumerate(roots)}
            edges = [
                (i, position[self._find(r.b)], r.pairs, r.cover)
                for i, root in enumerate(roots)
                for r in by_root.get(root, ())
            ]
            sizes = tuple(self._size(root) for root in roots)
            # The layers of a model repeat, and their grains are dealt once: the same sizes tied by the same arrays give
            # the same layouts. Arrays are compared by id(), since to hash millions of elements would take longer than
            # to deal them. Equal ops share one rule and hence its arrays (RuleTable), which `relations` keeps alive, so
            # that no id is used again; equal arrays of two rules only cost a second dealing.
            key = (sizes, tuple((i, j, id(p), cover) for i, j, p, cover in edges))
            if key not in solved:
                solved[key] = deal_grains(sizes, edges, self.tp)
            self._layouts.update(zip(roots, solved[key], strict=True))

    def _is_useful(self, op: Op, factor: Factor) -> bool:
        """True if the factor cuts some dim, and the op can run on the parts: a sum counts no element twice, and no rank
        is left without elements where torch refuses that."""
        layouts = [self.layout(*dim) for dim, _ in self._dims(op, factor)]
        if factor.reduces and any(layout is not None and layout.overlaps for layout in layouts):
            return False
        if factor.filled and any(x is not None and not all(x.parts) for x in layouts):
            return False
        return any(layout is not None for layout in layouts)


