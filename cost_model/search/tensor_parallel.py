"""The tensor-parallel search: one strategy per op, exact.

One variable per op, its domain the strategies that the op's rule allows. A strategy costs the op's compute seconds on
the slowest rank, plus the collective that makes its output whole when some consumer wants that: paid once, however many
consumers there are. A producer and a consumer agree when the tensor lies as the consumer wants it, or is whole (a rank
can cut its own piece out of a whole tensor). Memory enters as a price per byte of a matmul's weight that a rank holds
beyond an even share.

The minimum over all assignments is found by min-sum variable elimination (elimination.py); transformer graphs have a
treewidth of 2 to 6 once shape arithmetic is left out, so tables stay small and the time grows linearly with the number
of layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from cost_model.costs.communication import all_gather_seconds, all_reduce_seconds
from cost_model.costs.compute import op_seconds
from cost_model.costs.hardware import Hardware
from cost_model.errors import PlanError
from cost_model.graph.op_graph import SOURCES, FusedChain, Op, OpGraph, TensorRef, TensorSpec, is_norm
from cost_model.graph.placement import PARTIAL, REPLICATE, Layout, Placement, shard
from cost_model.graph.repeated_ops import repeated_ops
from cost_model.graph.roles import EXPERT, role_of
from cost_model.graph.symbols import expected_length
from cost_model.layouts.expert_siblings import Siblings, busiest_share, find_experts
from cost_model.layouts.layout_table import LayoutTable
from cost_model.layouts.routing import deciding_ops
from cost_model.rules.table import RuleTable
from cost_model.search.elimination import Elimination, Table, TooWideError
from cost_model.search.strategy import INFEASIBLE, Strategy, TensorParallelResult, exchanged_bytes, form, whole_strategy

# Breaks ties towards whole tensors: a residual that stays a sum over ranks costs no more to move, but a later
# all_reduce then adds up values that have grown, and loses more of a 16-bit dtype. Far below any real difference.
PARTIAL_INPUT_SECONDS = 1e-9


class TensorParallelSearch:
    """The search on one (graph, tp, hardware): domains and costs of all ops; `solve` finds the cheapest assignment.

    `sizes` maps symbols ("B", "S", "T") to the lengths at which seconds are counted. `roles` maps names of ops to the
    role that each must have.
    """

    def __init__(
        self,
        graph: OpGraph,
        tp: int,
        hardware: Hardware,
        sizes: Mapping[str, int],
        layouts: LayoutTable | None = None,
        roles: Mapping[str, str] | None = None,
    ) -> None:
        self.graph = graph
        self.tp = tp
        self.hardware = hardware
        self.sizes = dict(sizes)
        self.layouts = layouts or LayoutTable(graph, tp, RuleTable())
        self._specs: dict[TensorRef, TensorSpec] = {}
        self._whole = deciding_ops(graph)
        self.experts = find_experts(graph, tp, self.layouts.rules)
        self._seconds: dict[tuple[object, ...], float] = {}
        self._seconds_of: dict[tuple[str, Strategy], float] = {}
        self._rows: dict[str, float | None] = {}
        self._solved: dict[float, TensorParallelResult] = {}
        self.roles = dict(roles or {})

    # -- what an op can do -----------------------------------------------------------------------------------------

    def domain(self, op: Op) -> list[Strategy]:
        """Returns all strategies of `op`, the replicated one first, that of whole experts last; if the op must have a
        role, those with that role, which may be none."""
        every = self._own_domain(op)
        way = self.experts.ways.get(op.name)
        if way is not None:
            every = [*every, *self._gathered(Strategy(EXPERT, way.inputs, way.outputs, ()))]
        role = self.roles.get(op.name)
        return every if role is None else [s for s in every if role_of(op, s.factor) == role]

    def _own_domain(self, op: Op) -> list[Strategy]:
        """Returns the strategies by the op's own rule: one for each factor, and those that pass a sum on."""
        plain = Strategy("", (REPLICATE,) * len(op.inputs), (REPLICATE,) * len(op.outputs), (False,) * len(op.outputs))
        if self.tp == 1 or not op.outputs:
            return [plain]
        if op.kind == "param" and op.name not in self._whole:
            dims = range(len(op.outputs[0].shape))
            cuts = [shard(d) for d in dims if self.layouts.layout(TensorRef(op.name), d) is not None]
            return [plain, *(Strategy(str(p), (), (p,), (False,)) for p in cuts)]
        if op.kind in SOURCES or op.name not in self.graph.from_weights or op.name in self._whole:
            # Derived from the graph's inputs alone (masks, rotary tables): small, the same for every layer, and cheaper
            # to have whole everywhere. Left as variables they would tie all layers to each other.
            return [plain]
        by_placements = {(plain.inputs, plain.outputs): plain}
        for factor in self.layouts.factors(op):
            inputs = [REPLICATE] * len(op.inputs)
            outputs = [PARTIAL if factor.reduces else None for _ in op.outputs]
            for link in factor.inputs:
                if self.layouts.layout(op.inputs[link.slot], link.dim) is not None:
                    inputs[link.slot] = shard(link.dim)
            for link in factor.outputs:
                if self.layouts.layout(TensorRef(op.name, link.slot), link.dim) is not None:
                    outputs[link.slot] = shard(link.dim)
                else:
                    outputs[link.slot] = REPLICATE
            covers = any(link.cover for link in factor.inputs)
            if all(p.is_replicate for p in inputs) and factor.inputs and not covers:
                continue  # no input is sharded: each rank would only slice what it computes whole
            if any(p is None for p in outputs):
                continue
            outs = tuple(p for p in outputs if p is not None)
            sharded = Strategy(factor.name, tuple(inputs), outs, (False,) * len(outs))
            by_placements.setdefault((sharded.inputs, outs), sharded)
        for slots in self.layouts.rules(op, self.graph.input_specs(op)).linear_in:
            partial = tuple(PARTIAL if i in slots else REPLICATE for i in range(len(op.inputs)))
            out = (PARTIAL,) * len(op.outputs)
            by_placements.setdefault((partial, out), Strategy("", partial, out, (False,) * len(out)))
        return [both for s in by_placements.values() for both in self._gathered(s)]

    def _gathered(self, strategy: Strategy) -> list[Strategy]:
        """Returns the strategy as it is and, where a collective can make its outputs whole, with them gathered."""
        factor, inputs, outputs = strategy.factor, strategy.inputs, strategy.outputs
        gather = tuple(p.is_partial or p.kind == "S" for p in outputs)
        plain = Strategy(factor, inputs, outputs, (False,) * len(outputs))
        return [plain, Strategy(factor, inputs, outputs, gather)] if any(gather) else [plain]

    def decides(self, op: Op) -> bool:
        """True if the op decides where data goes (layouts/routing.py): it is whole on every rank, whatever it costs."""
        return op.name in self._whole

    # -- what it costs -----------------------------------------------------------------------------------------------

    def spec(self, ref: TensorRef) -> TensorSpec:
        """Returns the spec of a whole tensor at the search's sizes."""
        found = self._specs.get(ref)
        if found is None:
            at = self.graph.spec(ref).at(self.sizes)
            found = self._specs[ref] = TensorSpec(at.shape, at.dtype)
        return found

    def layout(self, ref: TensorRef, placement: Placement) -> Layout | None:
        """Returns the layout of a tensor that is sharded as `placement` says."""
        if placement.is_dealt:
            return self.experts.layouts[ref, placement.dim]
        return self.layouts.layout(ref, placement.dim)

    def local(self, ref: TensorRef, placement: Placement) -> TensorSpec:
        """Returns the spec of what the fullest rank holds of a tensor: the whole, unless it is sharded."""
        spec = self.spec(ref)
        if not placement.is_shard:
            return spec
        layout = self.layout(ref, placement)
        if layout is None:
            return spec
        shape = (*spec.shape[: placement.dim], layout.max_local_size, *spec.shape[placement.dim + 1 :])
        return TensorSpec(shape, spec.dtype)

    def held_bytes(self, op: Op, strategy: Strategy) -> int:
        """Returns a parameter's bytes on the fullest rank; for one of dealt experts, the average over its siblings of
        what that rank has of them all."""
        nbytes = self.local(TensorRef(op.name), strategy.outputs[0]).nbytes
        siblings = self._siblings(op, strategy)
        return nbytes if siblings is None else nbytes * siblings.most // siblings.count

    def on_slowest(self, op: Op, strategy: Strategy) -> float:
        """Returns the part of the op's work that the slowest rank has, on average over siblings: below 1 for experts
        that are dealt to ranks, else 1."""
        siblings = self._siblings(op, strategy)
        return 1.0 if siblings is None else siblings.share

    def _siblings(self, op: Op, strategy: Strategy) -> Siblings | None:
        return self.experts.siblings.get(op.name) if strategy.factor == EXPERT else None

    def compute_seconds(self, op: Op, strategy: Strategy) -> float:
        """Returns the op's compute seconds on the slowest tp rank, collectives excluded.

        An op on rows that values choose costs less if less than one row is expected; an op of dealt experts, its part
        of the time of the rank that has most to do.
        """
        known = self._seconds_of.get((op.name, strategy))
        if known is None:
            known = self._seconds_of[op.name, strategy] = self._compute_seconds(op, strategy)
        return known

    def _compute_seconds(self, op: Op, strategy: Strategy) -> float:
        if op.kind in SOURCES:
            return 0.0
        chain = self.graph.chains.get(op.name)
        if chain is not None and strategy.outputs[0] == shard(chain.dim):
            return self._unfused_seconds(op, chain, strategy.outputs[0])
        if op.name in self.graph.fused:
            return 0.0
        ins = tuple(self.local(self._read(r), p) for r, p in zip(op.inputs, strategy.inputs, strict=True))
        outs = tuple(self.local(TensorRef(op.name, j), p) for j, p in enumerate(strategy.outputs))
        if self.hardware.measured is not None and is_norm(self.graph, op):
            op = replace(op, kind="rms_norm")
        key = (op.kind, ins, outs, tuple(sorted(op.attrs.items())))
        total = self._seconds.get(key)
        if total is None:
            total = self._seconds[key] = op_seconds(op, ins, outs, self.hardware)
        siblings, rows = self._siblings(op, strategy), self._rows_expected(op)
        if siblings is None and rows is None:
            return total
        # The fixed cost of dispatch is paid once for each expert on a rank, whatever its rows; the rest grows with the
        # rows, of which the busiest rank has more than its even share.
        fixed = min(total, self.hardware.view_seconds if total < self.hardware.op_seconds else self.hardware.op_seconds)
        work, share = (total - fixed) * min(1.0, 1.0 if rows is None else rows), 1.0
        if siblings is not None:
            fixed *= siblings.share
            share = siblings.share if rows is None else busiest_share(siblings, rows, self.tp)
        return fixed + work * share

    def _unfused_seconds(self, op: Op, chain: FusedChain, cut: Placement) -> float:
        """Returns the seconds of a whole chain that is cut as `op` is, wherever its tensors have the shape of that."""
        shape = self.spec(TensorRef(op.name)).shape

        def local(ref: TensorRef) -> TensorSpec:
            return self.local(ref, cut if self.spec(ref).shape == shape else REPLICATE)

        total = 0.0
        for name in dict.fromkeys((*chain.ops, op.name)):
            one = self.graph[name]
            outs = tuple(local(TensorRef(name, j)) for j in range(len(one.outputs)))
            total += op_seconds(one, tuple(map(local, one.inputs)), outs, self.hardware)
        return total

    def _rows_expected(self, op: Op) -> float | None:
        """Returns the expected number of rows of the op's tensors, if that depends on values; else None."""
        if op.name not in self._rows:
            specs = (*op.outputs, *self.graph.input_specs(op))
            self._rows[op.name] = next(
                (expected_length(symbol, n, self.sizes) for spec in specs
                 for n, symbol in zip(spec.shape, spec.symbols) if "~" in symbol),
                None,
            )  # fmt: skip
        return self._rows[op.name]

    def _read(self, ref: TensorRef) -> TensorRef:
        """Returns the tensor that is really read by an op that reads `ref`: the keys of the KV heads, say, in place of
        their repetitions for all query heads (the same dims, fewer elements)."""
        op = self.graph[ref.op]
        if op.name in self.graph.fused and op.kind == "repeat_interleave":
            return op.inputs[0]
        return ref

    def gather_seconds(self, op: Op, strategy: Strategy) -> float:
        """Returns the seconds of the collectives that make the op's outputs whole, and of those inside of the op."""
        inside = exchanged_bytes(op, strategy, self.spec, self.tp)
        total = all_gather_seconds(inside, self.tp, self.hardware.tp_link) if inside else 0.0
        for j, (placement, gather) in enumerate(zip(strategy.outputs, strategy.gather, strict=True)):
            if gather:
                nbytes = self.spec(TensorRef(op.name, j)).nbytes
                seconds = all_reduce_seconds if placement.is_partial else all_gather_seconds
                total += seconds(nbytes, self.tp, self.hardware.tp_link)
        return total

    def excess_bytes(self, op: Op, strategy: Strategy) -> float:
        """Returns the bytes of a matmul's weight that a rank holds beyond an even share, for want of sharding.

        Shards that are uneven because grains are whole (5 of 9 heads on one of 2 ranks) are no excess, nor is a KV head
        on every rank that reads it: no strategy could do better.
        """
        if op.kind != "param" or not op.attrs.get("matmul"):
            return 0.0
        if strategy.factor == EXPERT:  # the strategy matters: 3 of 5 experts on one of 2 ranks, or half of each
            return self.held_bytes(op, strategy) - self.spec(TensorRef(op.name)).nbytes / self.tp
        if not strategy.outputs[0].is_replicate:
            return 0.0
        if op.name in self._whole or self.layouts.is_kept_whole(TensorRef(op.name)):
            return 0.0
        return self.spec(TensorRef(op.name)).nbytes * (1 - 1 / self.tp)

    def slice_seconds(self, have: Placement, want: Placement) -> float:
        """Returns the seconds to cut a rank's piece out of a whole tensor: an op's fixed cost, no bytes (a view)."""
        return self.hardware.op_seconds if want.is_shard and have != want else 0.0

    def agreement(self, producer: Strategy, index: int, wanted: Placement, ref: TensorRef) -> float:
        """Returns the seconds that a consumer which wants `wanted` spends to read an output; infinity if it cannot."""
        have = producer.outputs[index]
        if have == wanted:
            return 0.0
        if wanted.is_dealt or not (have.is_replicate or producer.gather[index]):
            return INFEASIBLE
        if wanted.is_owned and ref.op in self.experts.ways:
            return INFEASIBLE  # an expert is dealt whole or not at all
        if wanted.is_partial:  # rank 0 has it and the others zeros: an op that writes them
            return self.hardware.op_seconds + self.hardware.stream_seconds(self.spec(ref).nbytes)
        return self.slice_seconds(have, wanted)

    # -- the search ------------------------------------------------------------------------------------------------

    def solve(self, price: float) -> TensorParallelResult:
        """Returns the cheapest assignment. `price`: seconds per excess byte of matmul weight (see `excess_bytes`).

        Experts of one layer that are alike are treated alike: the same op of all of them is one variable. Where a layer
        runs so often on the same weights that no table holds all combinations, so are its runs; where that is not
        enough, ops without weights that tie most others together are kept whole on every rank, and the assignment is
        the cheapest of those. Raises ValueError where no assignment is possible, PlanError where the tables are too
        large all the same.
        """
        alike = {**repeated_ops(self.graph), **self.experts.twins}
        for twins, some_whole in ((self.experts.twins, False), (alike, False), (alike, True)):
            if price in self._solved:
                break
            try:
                self._solved[price] = self._solve(price, twins, some_whole)
            except TooWideError as error:
                if some_whole:
                    raise PlanError(
                        f"no plan for tp={self.tp}: in the search {error}, which are too many to try: use tp=1 and "
                        "more pipeline stages"
                    ) from error
        return self._solved[price]

    def _solve(self, price: float, twins: Mapping[str, str], some_whole: bool) -> TensorParallelResult:
        """Returns the cheapest assignment in which each op of `twins` does as the op that it is mapped to; where that
        is too much to search and `some_whole`, the cheapest of those in which some ops without weights are whole."""
        domains = {op.name: self.domain(op) for op in self.graph}
        costs: dict[str, Table] = {}
        outputs = set(self.graph.outputs)
        variable: dict[str, str] = {}
        # Ops of a layer's first expert come before those of its twins, which take over their tables.
        for op in sorted(self.graph, key=lambda op: op.name in twins):
            domain = domains[op.name]
            twin = twins.get(op.name, op.name)
            if twin != op.name and list(map(form, domain)) == list(map(form, domains[twin])):
                variable[op.name], costs[op.name] = twin, costs[twin]
                continue
            variable[op.name] = op.name
            costs[op.name] = np.array([
                self.compute_seconds(op, s)
                + self.gather_seconds(op, s)
                + price * self.excess_bytes(op, s)
                + PARTIAL_INPUT_SECONDS * sum(p.is_partial for p in s.inputs)
                for s in domain
            ])  # fmt: skip
            for j in range(len(op.outputs)):
                if TensorRef(op.name, j) in outputs:  # an output of the model must be whole
                    for k, s in enumerate(domain):
                        costs[op.name][k] += self.agreement(s, j, REPLICATE, TensorRef(op.name, j))
        # Costs of all ops of a variable are added up, and an edge between two variables is a table of the elimination;
        # an edge with only one choice to make is a cost of that choice, in `unary` and (to explain it) in `reading`.
        unary: dict[str, Table] = {}
        for name, v in variable.items():
            unary[v] = unary[v] + costs[name] if v in unary else costs[name]
        reading = {v: np.zeros_like(table) for v, table in unary.items()}
        pairs: dict[tuple[str, str], Table] = {}
        for op in self.graph:
            edges = [(ref.op, self._edge_table(domains[ref.op], domains[op.name], ref, slot))
                     for slot, ref in enumerate(op.inputs)]  # fmt: skip
            edges += [(number, _number_table(domains[number], domains[op.name])) for number in op.numbers]
            for producer, table in edges:
                if table is None:
                    continue
                u, v = variable[producer], variable[op.name]
                if len(domains[producer]) > 1 and len(domains[op.name]) > 1 and u != v:
                    pairs[u, v] = pairs[u, v] + table if (u, v) in pairs else table
                    continue
                if len(domains[producer]) == 1:
                    chooses, seconds = v, table[0]
                elif len(domains[op.name]) == 1:
                    chooses, seconds = u, table[:, 0]
                else:  # both ops share a variable, hence their choice
                    chooses, seconds = v, table.diagonal()
                unary[chooses] = unary[chooses] + seconds
                reading[chooses] = reading[chooses] + seconds
        known = {v: whole_strategy(domains[v]) for v in unary if some_whole and not self._reads_weights(v)}
        whole = {v: choice for v, choice in known.items() if choice is not None}
        elimination = Elimination(unary, pairs, whole if some_whole else None)
        strategies = {name: domains[name][elimination.choice[v]] for name, v in variable.items()}
        return TensorParallelResult(strategies, elimination.cost, domains, elimination, variable, reading, pairs)

    def _reads_weights(self, name: str) -> bool:
        return any(self.graph[n].kind == "param" for n in (name, *(ref.op for ref in self.graph[name].inputs)))

    def _edge_table(
        self, producers: Sequence[Strategy], consumers: Sequence[Strategy], ref: TensorRef, slot: int
    ) -> Table | None:
        """Returns the seconds of agreement, [producers, consumers]; None where neither has a choice."""
        if len(producers) == 1 and len(consumers) == 1:
            return None
        columns: dict[Placement, list[float]] = {}
        for c in consumers:
            wanted = c.inputs[slot]
            if wanted not in columns:
                columns[wanted] = [self.agreement(p, ref.index, wanted, ref) for p in producers]
        return np.array([columns[c.inputs[slot]] for c in consumers]).T


def _number_table(producers: Sequence[Strategy], consumers: Sequence[Strategy]) -> Table | None:
    """Returns 0 or infinity, [producers, consumers]: a number that one rank alone computes is read by it alone."""
    if len(producers) == 1:
        return None
    return np.array([
        [INFEASIBLE if p.factor == EXPERT != c.factor else 0.0 for c in consumers] for p in producers
    ])  # fmt: skip
