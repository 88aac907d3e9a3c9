"""The tensor-parallel search is exact, and Megatron's layout is what it finds, without being told."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import autodist_fx as adx
from cost_model.costs.hardware import A100, CPU_GLOO, Hardware
from cost_model.errors import NoPlanFits
from cost_model.search.elimination import Elimination
from tests.support.graphs.searches import SMALL, Parallel, assert_optimal, search_of
from tests.support.graphs.small import Mlp, op_graph_of
from tests.support.models import census, tiny_config

# -- variable elimination


@st.composite
def graphical_models(draw: st.DrawFn) -> tuple[dict[str, np.ndarray], dict[tuple[str, str], np.ndarray]]:
    """Whole numbers, so that equal costs are equal; some combinations are forbidden."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=6))
    cost = st.one_of(st.integers(0, 9).map(float), st.integers(0, 9).map(float), st.just(np.inf))
    names = [f"v{i}" for i in range(len(sizes))]

    def table(*shape: int) -> np.ndarray:
        count = math.prod(shape)
        return np.array(draw(st.lists(cost, min_size=count, max_size=count))).reshape(shape)

    unary = {name: table(size) for name, size in zip(names, sizes)}
    pairs = {
        (names[i], names[j]): table(sizes[i], sizes[j])
        for i, j in itertools.combinations(range(len(sizes)), 2)
        if draw(st.booleans())
    }
    return unary, pairs


def cost_of(
    choice: dict[str, int], unary: dict[str, np.ndarray], pairs: dict[tuple[str, str], np.ndarray]
) -> float:
    own = sum(float(table[choice[v]]) for v, table in unary.items())
    return own + sum(float(table[choice[u], choice[v]]) for (u, v), table in pairs.items())


@settings(max_examples=300)
@given(graphical_models())
def test_elimination_equals_trying_everything(
    model: tuple[dict[str, np.ndarray], dict[tuple[str, str], np.ndarray]],
) -> None:
    unary, pairs = model
    every = itertools.product(*(range(len(table)) for table in unary.values()))
    least = min(cost_of(dict(zip(unary, choice)), unary, pairs) for choice in every)
    if least == np.inf:
        with pytest.raises(ValueError, match="no combination"):
            Elimination(unary, pairs)
        return
    found = Elimination(unary, pairs)
    assert found.cost == least == cost_of(found.choice, unary, pairs)
    for name, table in unary.items():  # and so does forcing each value of each variable
        for k in range(len(table)):
            others = itertools.product(*([k] if v == name else range(len(t)) for v, t in unary.items()))
            best = min(cost_of(dict(zip(unary, choice)), unary, pairs) for choice in others)
            assert found.dearer_by(name)[k] == best - least
            if best < np.inf:
                assert cost_of({**found.choice, **found.forced(name, k)}, unary, pairs) == best
            else:
                with pytest.raises(ValueError, match="cannot be"):
                    found.forced(name, k)


def test_elimination_of_a_long_chain_is_quick() -> None:
    """A thousand variables of three values: 3^1000 combinations, tables of nine."""
    random = np.random.default_rng(0)
    unary = {f"v{i}": random.integers(0, 9, 3).astype(float) for i in range(1000)}
    pairs = {(f"v{i}", f"v{i + 1}"): random.integers(0, 9, (3, 3)).astype(float) for i in range(999)}
    graph: nx.DiGraph[object] = nx.DiGraph()
    for i in range(1000):  # the same as a shortest path
        for k in range(3):
            for j in range(3) if i else (0,):
                step = pairs[f"v{i - 1}", f"v{i}"][j, k] if i else 0
                graph.add_edge((i - 1, j), (i, k), weight=unary[f"v{i}"][k] + step)
    lengths = nx.single_source_dijkstra_path_length(graph, (-1, 0))
    assert Elimination(unary, pairs).cost == min(lengths[999, k] for k in range(3))


# -- the search against all strategies ---------------------------------------------------------------------------------


@pytest.mark.drawn(2)
@pytest.mark.parametrize("price", [0.0, 1e-9, 1e-6])
@pytest.mark.parametrize("hardware", [CPU_GLOO, A100], ids=lambda h: h.name)
@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("name", SMALL)
def test_solve_equals_trying_all_strategies(name: str, tp: int, hardware: Hardware, price: float) -> None:
    module, inputs = SMALL[name]
    assert_optimal(search_of(op_graph_of(module, **inputs), tp, hardware), price)


def test_a_split_mlp_is_column_then_row_with_one_sum() -> None:
    strategies = search_of(op_graph_of(Mlp(), x=("B", "S", 8)), 2, CPU_GLOO).solve(1e-6).strategies
    assert (strategies["up"].factor, strategies["down"].factor) == ("column", "row")
    gathered = [name for name, s in strategies.items() if any(s.gather)]
    assert gathered == ["down"] and strategies["down"].outputs[0].is_partial


def test_branches_that_are_added_are_summed_once() -> None:
    """A number times a sum still owed, and the sum of two, are sums still owed."""
    strategies = search_of(op_graph_of(Parallel(), x=("B", "S", 8)), 2, CPU_GLOO).solve(1e-6).strategies
    assert [(name, s.outputs[0].kind) for name, s in strategies.items() if any(s.gather)] == [("add", "P")]


def test_one_rank_has_nothing_to_choose() -> None:
    search = search_of(op_graph_of(Mlp(), x=("B", "S", 8)), 1, CPU_GLOO)
    assert all(len(search.domain(op)) == 1 for op in search.graph)
    assert not any(any(s.gather) for s in search.solve(1e-6).strategies.values())


# -- whole models ------------------------------------------------------------------------------------------------------

# What Megatron-LM does by hand with each of these.
MEGATRON = {
    "llama": ({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}, {"o_proj", "down_proj"}),
    "qwen2": ({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}, {"o_proj", "down_proj"}),
    "gpt2": ({"c_attn", "c_fc"}, {"c_proj"}),
    "opt": ({"q_proj", "k_proj", "v_proj", "fc1"}, {"out_proj", "fc2"}),
}


def layers(count: int) -> dict[str, int]:
    return {"num_hidden_layers": count, "n_layer": count}


@pytest.mark.drawn(3)
@pytest.mark.parametrize("use_cache", [False, True], ids=["forward", "cache"])
@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("family", MEGATRON)
def test_megatrons_layout_is_found(family: str, tp: int, use_cache: bool) -> None:
    columns, rows = MEGATRON[family]
    counts = []
    for count in (2, 3):
        compiled = adx.compile(tiny_config(family, **layers(count)), tp=tp, use_cache=use_cache, hardware="cpu-gloo")
        repeated = [op for op in compiled.plan.ops if any(atom.isdecimal() for atom in op.module.split("."))]
        roles = {(op.module.rpartition(".")[2], op.role) for op in repeated if op.kind == "linear"}
        assert roles == {(name, "column") for name in columns} | {(name, "row") for name in rows}
        of_ranks = [Counter(census(compiled.rank(rank))) for rank in range(tp)]
        assert all(found == of_ranks[0] for found in of_ranks)
        counts.append(of_ranks[0])
        # of the vocabulary: at most the embedding's one sum (or gather), and the logits' gather
        assert of_ranks[0]["all_reduce"] - 2 * count in (0, 1)
        assert of_ranks[0]["all_gather"] <= 2
        assert of_ranks[0]["all_reduce"] - 2 * count + of_ranks[0]["all_gather"] <= 2
        assert not of_ranks[0]["send"] and not of_ranks[0]["recv"]
    assert counts[1] - counts[0] == Counter(all_reduce=2), "another layer brings exactly two sums, and nothing else"


@pytest.mark.parametrize("family", MEGATRON)
def test_every_matmul_weight_is_sharded(family: str) -> None:
    plan = adx.compile(tiny_config(family), tp=2, hardware="cpu-gloo").plan
    assert not [p.name for p in plan.params if p.matmul and p.placement.is_replicate]


def test_latency_alone_declines_to_split_what_is_too_small() -> None:
    config = tiny_config("llama")
    few = {"B": 1, "S": 8}
    fast = adx.compile(config, tp=2, hardware="cpu-gloo", objective="latency", sizes=few)
    split = adx.compile(config, tp=2, hardware="cpu-gloo", sizes=few)
    assert not census(fast.rank(0)) and all(p.placement.is_replicate for p in fast.plan.params)
    assert fast.plan.predicted_seconds < split.plan.predicted_seconds


def test_latency_alone_splits_what_gains_by_it() -> None:
    wide = {"hidden_size": 4096, "intermediate_size": 16384, "num_attention_heads": 32, "num_key_value_heads": 32}
    config = tiny_config("llama", head_dim=128, num_hidden_layers=1, **wide)
    fast = adx.compile(config, tp=2, hardware="a100", objective="latency", sizes={"B": 4, "S": 2048})
    assert {op.role for op in fast.plan.ops if op.module.endswith(("up_proj", "down_proj"))} == {"column", "row"}
    assert fast.plan.predicted_seconds < fast.plan.one_device_seconds


def test_a_memory_limit_makes_latency_split() -> None:
    config = tiny_config("llama", tie_word_embeddings=False)
    alone = adx.compile(config, tp=2, hardware="cpu-gloo", objective="latency").plan
    split = adx.compile(config, tp=2, hardware="cpu-gloo").plan
    most, least = alone.stages[0].weight_bytes, split.stages[0].weight_bytes
    assert least < most
    limited = adx.compile(config, tp=2, hardware="cpu-gloo", objective="latency", max_memory=(most + least) // 2).plan
    assert least <= limited.stages[0].weight_bytes <= (most + least) // 2
    with pytest.raises(NoPlanFits, match="more ranks"):
        adx.compile(config, tp=2, hardware="cpu-gloo", objective="latency", max_memory=least - 1)
