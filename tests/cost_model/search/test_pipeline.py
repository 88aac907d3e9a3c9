"""The pipeline search: cuts against every placement of them, what crosses against every choice of recomputing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import autodist_fx as adx
from cost_model.errors import MeshError, NoPlanFits
from cost_model.graph.op_graph import Op, OpGraph, TensorRef, TensorSpec
from cost_model.search.pipeline import OpCost, PipelineSearch, Stage
from tests.support.graphs.small import Ids, Mlp, Stack, op_graph_of
from tests.support.models import tiny_config

# -- cuts --------------------------------------------------------------------------------------------------------------


@st.composite
def chains(draw: st.DrawFn) -> tuple[PipelineSearch, int, list[int] | None]:
    """Layers in a row with residuals over one op, each with a weight of its own, some weights tied; stages; memory."""
    count = draw(st.integers(2, 8))
    ops = [Op("x", "input", (), (TensorSpec((4,), "float32"),))]
    weights: list[str] = []
    last, residual = "x", "x"
    costs: dict[str, OpCost] = {}
    weight_bytes: dict[str, int] = {}
    for i in range(count):
        tied = bool(weights) and draw(st.integers(0, 4)) == 0
        weight = draw(st.sampled_from(weights)) if tied else f"w{i}"
        if not tied:
            weights.append(weight)
            weight_bytes[weight] = draw(st.integers(1, 9))
            ops.append(Op(weight, "param", (), (TensorSpec((4,), "float32"),)))
        inputs = [TensorRef(last), TensorRef(weight)]
        if draw(st.booleans()):
            inputs.append(TensorRef(residual))
        rows, width = draw(st.sampled_from(["S", "P"])), draw(st.integers(1, 3))
        spec = TensorSpec((EXAMPLE[rows], width), "float32", (rows, ""))
        ops.append(Op(f"op{i}", "linear", tuple(inputs), (spec,)))
        costs[f"op{i}"] = OpCost(float(draw(st.integers(1, 9))), draw(st.integers(0, 3)), False)
        residual, last = last, f"op{i}"
    graph = OpGraph(ops, [TensorRef(last)])
    sends = {TensorRef(op.name): 1.0 for op in graph}
    memory = draw(st.one_of(st.none(), st.lists(st.integers(5, 40), min_size=4, max_size=4)))
    return PipelineSearch(graph, costs, sends, weight_bytes, PLANNED), draw(st.integers(1, 4)), memory


EXAMPLE, PLANNED = {"S": 7, "P": 11}, {"S": 5, "P": 3}  # lengths while tracing, and those that the plan is made for


def bytes_crossing(search: PipelineSearch, position: int) -> int:
    """At the plan's lengths, of tensors made before the position and read at it or after."""
    graph = search.graph
    return sum(
        4 * PLANNED[graph[name].outputs[0].symbols[0]] * graph[name].outputs[0].shape[1]
        for name in search.sequence[:position]
        if any(search.position[user] >= position for user, _ in graph.users.get(TensorRef(name), ()))
    )


def held(search: PipelineSearch, start: int, stop: int) -> int:
    names = search.sequence[start:stop]
    read = {ref.op for name in names for ref in search.graph[name].inputs}
    state = sum(search.costs[name].state_bytes for name in names)
    return state + sum(nbytes for weight, nbytes in search.weight_bytes.items() if weight in read)


def best_by_trying(
    search: PipelineSearch, stages: int, memory: list[int] | None
) -> tuple[float, int] | None:
    """(seconds of the slowest stage, bytes over all hops), over all choices among the places to cut."""
    found = []
    for cuts in itertools.combinations(search.candidates(stages - 1), stages - 1):
        ends = [0, *cuts, len(search.sequence)]
        spans = list(itertools.pairwise(ends))
        if memory is not None and any(held(search, a, b) > memory[k] for k, (a, b) in enumerate(spans)):
            continue
        slowest = max(sum(search.costs[name].seconds for name in search.sequence[a:b]) for a, b in spans)
        found.append((slowest, sum(bytes_crossing(search, cut) for cut in cuts)))
    return min(found, default=None)


@settings(max_examples=400)
@given(chains())
def test_cuts_equal_trying_all_of_them(drawn: tuple[PipelineSearch, int, list[int] | None]) -> None:
    search, stages, memory = drawn
    places = search.candidates(stages - 1)
    if len(places) < stages - 1:
        with pytest.raises(MeshError, match=f"use pp={len(places) + 1} at most"):
            search.solve(stages, memory)
        return
    expected = best_by_trying(search, stages, memory)
    if expected is None:
        with pytest.raises(NoPlanFits, match="more ranks"):
            search.solve(stages, memory)
        return
    found = search.solve(stages, memory)
    assert [(s.start, s.stop) for s in found] == list(itertools.pairwise([s.start for s in found] + [found[-1].stop]))
    assert found[0].start == 0 and found[-1].stop == len(search.sequence) and len(found) == stages
    slowest = max(sum(search.costs[name].seconds for name in search.sequence[s.start : s.stop]) for s in found)
    crossing = sum(bytes_crossing(search, s.start) for s in found[1:])
    assert (slowest, crossing) == expected
    if memory is not None:
        assert all(held(search, s.start, s.stop) <= memory[k] for k, s in enumerate(found))


@settings(max_examples=200)
@given(
    chains(),
    st.lists(st.integers(1, 4), min_size=4, max_size=4),
    st.lists(st.integers(0, 9), min_size=4, max_size=4),
    st.sampled_from(["seconds", "bytes"]),
)
def test_unequal_devices_equal_trying_all_cuts(
    drawn: tuple[PipelineSearch, int, list[int] | None], slowness: list[int], waits: list[int], balance: str
) -> None:
    """Stage k's device takes `slowness[k]` times as long, and waits[k] for what it receives. The first demand first,
    then the second, then the bytes."""
    search, stages, memory = drawn
    places = search.candidates(stages - 1)
    if len(places) < stages - 1:
        return
    times = [{name: cost.seconds * slowness[k] for name, cost in search.costs.items()} for k in range(stages)]

    def worth(ends: list[int]) -> tuple[float, ...] | None:
        spans = list(itertools.pairwise(ends))
        full = [held(search, a, b) for a, b in spans]
        if memory is not None and any(nbytes > memory[k] for k, nbytes in enumerate(full)):
            return None
        seconds = max(
            sum(times[k][name] for name in search.sequence[a:b]) + (waits[k] if k else 0)
            for k, (a, b) in enumerate(spans)
        )
        fullest = max(nbytes / (memory[k] if memory is not None else 1) for k, nbytes in enumerate(full))
        crossing = sum(bytes_crossing(search, cut) for cut in ends[1:-1])
        return (seconds, crossing) if balance == "seconds" else (fullest, seconds, crossing)

    last = len(search.sequence)
    every = [worth([0, *cuts, last]) for cuts in itertools.combinations(places, stages - 1)]
    best = min((value for value in every if value is not None), default=None)
    if best is None:
        with pytest.raises(NoPlanFits):
            search.solve(stages, memory, seconds=times, balance=balance)
        return

    def arrival(k: int, stage: Stage, starts: Sequence[int]) -> float:
        return waits[k] if stage.received else 0

    found = search.solve(stages, memory, seconds=times, balance=balance, arrival=arrival)
    starts = [s.start for s in found]
    assert worth([*starts, last]) == best
    slowest = max(search.stage_seconds(k, stage, starts) for k, stage in enumerate(found))
    assert slowest == best[0 if balance == "seconds" else 1]


def test_candidates_are_where_fewest_tensors_cross() -> None:
    """Cuts x + mlp(x): between two layers only x crosses; inside one, x and the branch."""
    graph = op_graph_of(Stack([Mlp(), Mlp(), Mlp()]), x=("B", "S", 8))
    costs = {op.name: OpCost(1.0, 0, False) for op in graph if op.kind not in ("input", "param", "buffer")}
    search = PipelineSearch(graph, costs, {}, {})
    assert [search.sequence[p - 1] for p in search.candidates()] == ["add", "add_1"]


def test_what_crosses_is_counted_at_the_lengths_of_the_plan() -> None:
    """[S], [P], [S], [P] in a row: a chain is cut where the smaller ones cross, and which these are the lengths say."""
    ops, costs = [Op("x", "input", (), (TensorSpec((4,), "float32"),))], {}
    for i, symbol in enumerate("SPSP"):
        ops.append(Op(f"w{i}", "param", (), (TensorSpec((4,), "float32"),)))
        spec = TensorSpec((EXAMPLE[symbol],), "float32", (symbol,))
        ops.append(Op(f"op{i}", "linear", (TensorRef(f"op{i - 1}" if i else "x"), TensorRef(f"w{i}")), (spec,)))
        costs[f"op{i}"] = OpCost(1.0, 0, False)
    graph = OpGraph(ops, [TensorRef("op3")])
    sends = {TensorRef(op.name): 1.0 for op in graph}

    def smallest(sizes: dict[str, int]) -> list[int]:
        crossing = [0, *(4 * sizes[symbol] for symbol in "SPS"), 0]  # bytes before each op, and behind the last
        return [p for p in (1, 2, 3) if all(crossing[p] < (crossing[q] or 99) for q in (p - 1, p + 1))]

    for sizes in (EXAMPLE, PLANNED):
        search = PipelineSearch(graph, costs, sends, {}, sizes)
        assert search.candidates() == smallest(sizes)
        assert [s.stop for s in search.solve(2)] == [min(smallest(sizes), key=lambda p: abs(p - 2)), 4]


def test_a_tensor_used_far_on_is_no_reason_to_refuse_a_cut() -> None:
    """One place where a single tensor crosses; behind it two do at every place: those serve where one is not enough."""
    spec = (TensorSpec((4,), "float32"),)
    ops = [Op("x", "input", (), spec), Op("w", "param", (), spec)]
    for i in range(6):
        inputs = [TensorRef(f"op{i - 1}" if i else "x"), TensorRef("w")]
        wide = (TensorSpec((9,), "float32"),) if i % 2 else spec
        ops.append(Op(f"op{i}", "linear", (*inputs, TensorRef("op0")) if i == 5 else tuple(inputs), wide))
    graph = OpGraph(ops, [TensorRef("op5")])
    costs = {op.name: OpCost(1.0, 0, False) for op in graph if op.kind == "linear"}
    search = PipelineSearch(graph, costs, {TensorRef(op.name): 1.0 for op in graph}, {})
    assert search.candidates() == [1]
    assert search.candidates(3) == [1, 3, 5]
    assert [s.stop for s in search.solve(4)] == [1, 3, 5, 6]


def test_a_slow_stage_is_cut_smaller() -> None:
    """Seconds 1, 1, 1, 9: the last alone; and where memory forbids the best cut, the next best."""
    ops = [Op("x", "input", (), (TensorSpec((4,), "float32"),))]
    for i in range(4):
        ops.append(Op(f"w{i}", "param", (), (TensorSpec((4,), "float32"),)))
        before = TensorRef(f"op{i - 1}" if i else "x")
        ops.append(Op(f"wide{i}", "linear", (before, TensorRef(f"w{i}")), (TensorSpec((9,), "float32"),)))
        ops.append(Op(f"op{i}", "linear", (TensorRef(f"wide{i}"), TensorRef(f"w{i}")), (TensorSpec((4,), "float32"),)))
    graph = OpGraph(ops, [TensorRef("op3")])
    costs = {op.name: OpCost(4.5 if "3" in op.name else 0.5, 0, False) for op in graph if op.kind == "linear"}
    search = PipelineSearch(graph, costs, {TensorRef(op.name): 1.0 for op in graph}, {f"w{i}": 10 for i in range(4)})
    assert [s.stop for s in search.solve(2)] == [6, 8]
    assert [s.stop for s in search.solve(2, [20, 99])] == [4, 8]
    with pytest.raises(NoPlanFits, match="no cut into 2 stages fits"):
        search.solve(2, [10, 20])
    with pytest.raises(NoPlanFits, match="no cut into 1 stages fits"):
        search.solve(1, [39])
    with pytest.raises(MeshError, match="pp=5 needs 4 cuts, but the model has only 3 places"):
        search.solve(5)


# -- what is sent, and what is computed again --------------------------------------------------------------------------


@st.composite
def borders(draw: st.DrawFn) -> tuple[PipelineSearch, int]:
    """A DAG of ops and a position to cut it at. Some ops may not be repeated, some results not be sent."""
    count = draw(st.integers(2, 7))
    ops = [Op("x", "input", (), (TensorSpec((4,), "float32"),))]
    costs: dict[str, OpCost] = {}
    sends: dict[TensorRef, float] = {}
    for i in range(count):
        inputs = {draw(st.sampled_from(["x", *(f"op{j}" for j in range(i))])) for _ in range(draw(st.integers(1, 3)))}
        ops.append(Op(f"op{i}", "mul", tuple(TensorRef(n) for n in sorted(inputs)), (TensorSpec((4,), "float32"),)))
        costs[f"op{i}"] = OpCost(draw(st.integers(1, 8)) / 2, 0, draw(st.integers(0, 3)) > 0)
        sends[TensorRef(f"op{i}")] = draw(st.sampled_from([1.0, 2.0, 3.0, 5.0, 8.0, math.inf]))
    sends[TensorRef("x")] = 1.0
    graph = OpGraph(ops, [TensorRef(f"op{count - 1}")])
    return PipelineSearch(graph, costs, sends, {}), draw(st.integers(1, count - 1))


def border_cost(search: PipelineSearch, recomputed: set[str], start: int) -> float:
    """Seconds to have all that ops from `start` on read of those before it; infinity where that is not allowed."""
    cost = 0.0
    sent: set[TensorRef] = set()
    for name in recomputed:
        if not search.costs[name].repeatable:
            return math.inf
        cost += search.costs[name].seconds
    for name in [*recomputed, *search.sequence[start:]]:
        for ref in search.graph[name].inputs:
            if ref.op in search.position and search.position[ref.op] < start and ref.op not in recomputed:
                sent.add(ref)
    return cost + sum(search.send_seconds[ref] for ref in sent)


@settings(max_examples=400)
@given(borders())
def test_recomputing_equals_trying_every_subset(drawn: tuple[PipelineSearch, int]) -> None:
    search, start = drawn
    before = search.sequence[:start]
    subsets = itertools.chain.from_iterable(itertools.combinations(before, n) for n in range(len(before) + 1))
    least = min(border_cost(search, set(subset), start) for subset in subsets)
    if least == math.inf:
        with pytest.raises(MeshError, match=r"neither be sent there .* nor computed again"):
            search.stage_of_ops(start, len(search.sequence))
        return
    stage: Stage = search.stage_of_ops(start, len(search.sequence))
    assert border_cost(search, set(stage.recomputed), start) == least
    needed = {
        ref
        for name in [*stage.recomputed, *search.sequence[start:]]
        for ref in search.graph[name].inputs
        if ref.op in search.position and search.position[ref.op] < start and ref.op not in stage.recomputed
    }
    assert set(stage.received) == needed and len(stage.received) == len(needed)


def test_numbers_are_never_sent() -> None:
    """A length is computed again wherever it is wanted, and so is what it is computed from."""
    tensor = (TensorSpec((4,), "float32"),)
    ops = [
        Op("x", "input", (), tensor),
        Op("dear", "mul", (TensorRef("x"),), tensor),
        Op("length", "scalar.size", (TensorRef("dear"),)),
        Op("user", "mul", (TensorRef("x"), TensorRef("length")), tensor),
    ]
    costs = {"dear": OpCost(5.0, 0, True), "length": OpCost(0.1, 0, True), "user": OpCost(1.0, 0, False)}
    stage = PipelineSearch(OpGraph(ops, [TensorRef("user")]), costs, {TensorRef("dear"): 3.0}, {}).stage_of_ops(2, 3)
    assert (stage.recomputed, stage.received) == (("length",), (TensorRef("dear"),))


# -- whole models ------------------------------------------------------------------------------------------------------


@pytest.mark.drawn(2)
@pytest.mark.parametrize("use_cache", [False, True], ids=["forward", "cache"])
@pytest.mark.parametrize("pp", [2, 3])
def test_hidden_states_are_sent_and_the_rest_is_computed_again(pp: int, use_cache: bool) -> None:
    config = tiny_config("llama", num_hidden_layers=2 * pp)
    plan = adx.compile(config, pp=pp, hardware="cpu-gloo", use_cache=use_cache).plan
    assert len(plan.hops) == pp - 1, "one tensor a border"
    for stage, hop in enumerate(plan.hops):
        assert (hop.source, hop.target) == (stage, stage + 1)
        assert plan.op(hop.op).kind == "add" and ".layers." in f".{plan.op(hop.op).module}."
    assert all(op.stages == (op.home,) for op in plan.ops if op.weight), "no product is computed twice"
    for stage in plan.stages[1:]:
        again = {plan.op(name).kind for name in stage.recomputed}
        assert {"cos", "sin"} <= again, "rotary tables"
        assert any(kind in again for kind in ("and", "le", "where")), "the mask"


def test_a_tied_embedding_lives_on_both_stages() -> None:
    plan = adx.compile(tiny_config("llama", tie_word_embeddings=True), pp=2, hardware="cpu-gloo").plan
    embed = next(p for p in plan.params if "embed" in p.name)
    assert embed.stages == (0, 1)
    assert not any(p.name == "lm_head.weight" for p in plan.params)


def test_unequal_devices_get_unequal_layers() -> None:
    """An h100 has 1.64 times an a100's bandwidth, which a token of a large model waits for."""
    config = tiny_config(
        "llama", num_hidden_layers=16, hidden_size=8192, intermediate_size=28672, num_attention_heads=64,
        num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    for devices in (["a100", "h100"], ["h100", "a100"], {"1": {"hardware": "h100", "memory": "80GB"}, "0": "a100"}):
        plan = adx.compile(config, pp=2, use_cache=True, device_map=devices, verify=False).plan
        layers = [sum("layers." in name for name in stage.layers) for stage in plan.stages]
        names = [device.hardware for device in plan.request.device_map]
        slow, fast = names.index("a100"), names.index("h100")
        assert layers[fast] - layers[slow] in (3, 4, 5), "10 or so of 16: 1.64 to 1"
        assert plan.stages[slow].compute_seconds == pytest.approx(plan.stages[fast].compute_seconds, rel=0.2)
    small = [{"hardware": "h100", "memory": "12GB"}, {"hardware": "h100", "memory": "60GB"}]
    plan = adx.compile(config, pp=2, use_cache=True, device_map=small, verify=False).plan
    assert plan.stages[0].weight_bytes + plan.stages[0].kv_cache_bytes <= 12e9 < plan.stages[1].weight_bytes


def test_too_many_stages_and_too_little_memory_say_what_to_do() -> None:
    config = tiny_config("llama")
    with pytest.raises(MeshError, match=r"pp=99 needs 98 cuts, .* use pp=\d+ at most"):
        adx.compile(config, pp=99, hardware="cpu-gloo")
    with pytest.raises(NoPlanFits, match="use more ranks"):
        adx.compile(config, pp=2, hardware="cpu-gloo", max_memory=1000)


def test_the_stages_of_a_vocabulary_model_share_its_weights_evenly() -> None:
    """The head is as dear as a layer: the cut does not leave the layers' middle for nothing."""
    graph = op_graph_of(Stack([Mlp(8, 64) for _ in range(4)], 8, vocab=32), x=Ids("B", "S"))
    costs = {
        op.name: OpCost(2.0 if op.kind == "linear" else 0.1, 0, op.kind != "linear")
        for op in graph
        if op.kind not in ("input", "param", "buffer")
    }
    sends = {TensorRef(op.name, j): 9.0 for op in graph for j in range(len(op.outputs))}
    stages = PipelineSearch(graph, costs, sends, {}).solve(2)
    sequence = PipelineSearch(graph, costs, sends, {}).sequence
    linears = [sum(graph[name].kind == "linear" for name in sequence[s.start : s.stop]) for s in stages]
    assert linears in ([4, 5], [5, 4]), "eight of the layers and one head"
