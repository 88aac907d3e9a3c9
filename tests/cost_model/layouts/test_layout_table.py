"""Layouts by element: heads stay whole however q, k and v lie in memory, and ranks hold even shares of grains."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_model.graph.op_graph import TensorRef
from cost_model.graph.placement import Layout, intervals_of
from cost_model.layouts.grains import Edge, deal_grains
from cost_model.layouts.layout_table import LayoutTable
from tests.support.graphs.small import Attention, Ids, Mlp, Stack, op_graph_of


def layouts_of_attention(
    tp: int, heads: int, groups: int, size: int = 3, fused: str = ""
) -> dict[str, Layout | None]:
    """The layout of each weight's head dim."""
    graph = op_graph_of(Attention(12, heads, groups, size, fused), x=("B", "S", 12))
    table = LayoutTable(graph, tp)
    names = ("qkv",) if fused else ("q", "k", "v")
    found = {name: table.layout(TensorRef(f"{name}.weight"), 0) for name in names}
    for name in names:
        assert found[name] == table.layout(TensorRef(f"{name}.bias"), 0), "a bias lies like its weight"
    found["o"] = table.layout(TensorRef("o.weight"), 1)
    return found


def whole_heads(layout: Layout | None, count: int, size: int, tp: int) -> list[list[int]]:
    """For each rank its heads; fails where a head is cut."""
    if layout is None:
        return [list(range(count))] * tp
    held = []
    for part in layout.parts:
        elements = {i for start, stop in part for i in range(start, stop)}
        heads = sorted({i // size for i in elements})
        assert elements == {h * size + i for h in heads for i in range(size)}, f"a head is cut: {part}"
        held.append(heads)
    return held


def test_nine_heads_with_three_kv_heads_on_two_ranks_are_cut_6_and_3() -> None:
    found = layouts_of_attention(2, heads=9, groups=3, size=4)
    assert found["q"] == found["o"] == Layout(36, (((0, 24),), ((24, 36),)))
    assert found["k"] == found["v"] == Layout(12, (((0, 8),), ((8, 12),)))


def test_fewer_kv_heads_than_ranks_are_replicated_on_some() -> None:
    found = layouts_of_attention(4, heads=6, groups=2, size=1)
    assert found["q"] == Layout(6, (((0, 2),), ((2, 4),), ((4, 5),), ((5, 6),)))
    assert found["k"] == Layout(2, (((0, 1),), ((0, 2),), ((1, 2),), ((1, 2),)))


def test_one_kv_head_is_held_by_all() -> None:
    found = layouts_of_attention(3, heads=6, groups=1)
    assert found["q"] == Layout(18, (((0, 6),), ((6, 12),), ((12, 18),)))
    assert found["k"] is None and found["v"] is None


def test_fused_qkv_is_cut_in_each_third() -> None:
    found = layouts_of_attention(2, heads=4, groups=4, size=2, fused="thirds")
    assert found["qkv"] == Layout(24, (((0, 4), (8, 12), (16, 20)), ((4, 8), (12, 16), (20, 24))))
    assert found["o"] == Layout(8, (((0, 4),), ((4, 8),)))


def test_interleaved_qkv_is_cut_between_heads_or_groups() -> None:
    per_head = layouts_of_attention(2, heads=3, groups=3, size=2, fused="heads")
    assert per_head["qkv"] == Layout(18, (((0, 12),), ((12, 18),)))  # 3 x [q, k, v] of 2
    assert per_head["o"] == Layout(6, (((0, 4),), ((4, 6),)))
    per_group = layouts_of_attention(2, heads=6, groups=3, size=2, fused="groups")
    assert per_group["qkv"] == Layout(24, (((0, 16),), ((16, 24),)))  # 3 x [q, q, k, v] of 2
    assert per_group["o"] == Layout(12, (((0, 8),), ((8, 12),)))


def test_ranks_without_a_head_hold_nothing() -> None:
    assert layouts_of_attention(4, heads=3, groups=3, size=2)["q"] == Layout(6, (((0, 2),), ((2, 4),), ((4, 6),), ()))


def test_grains_of_an_mlp_and_a_vocabulary_are_single_elements() -> None:
    graph = op_graph_of(Stack([Mlp(8, 11)], 8, vocab=13), x=Ids("B", "S"))
    table = LayoutTable(graph, 3)
    hidden = Layout(11, (((0, 4),), ((4, 8),), ((8, 11),)))
    assert table.layout(TensorRef("layers.0.up.weight"), 0) == hidden
    assert table.layout(TensorRef("layers.0.down.weight"), 1) == hidden
    vocab = Layout(13, (((0, 5),), ((5, 9),), ((9, 13),)))
    assert table.layout(TensorRef("embed.weight"), 0) == vocab
    assert table.layout(TensorRef("head.weight"), 0) == vocab


def test_batch_and_sequence_are_never_cut() -> None:
    graph = op_graph_of(Mlp(), x=("B", "S", 8))
    table = LayoutTable(graph, 2)
    assert [table.layout(TensorRef("up"), dim) is None for dim in range(3)] == [True, True, False]


@given(
    st.sampled_from(["", "thirds", "heads", "groups"]), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3),
    st.integers(2, 5),
)  # fmt: skip
def test_any_heads_on_any_ranks(fused: str, groups: int, each: int, size: int, tp: int) -> None:
    """No head is cut; each rank holds the KV heads that its query heads read; together they hold all; shares are even.

    Where a rank would hold fewer than one KV group, query heads are dealt out instead.
    """
    if fused == "heads":
        each = 1
    heads = groups * each
    found = layouts_of_attention(tp, heads, groups, size, fused)
    outputs = whole_heads(found["o"], heads, size, tp)
    if not fused:
        queries = whole_heads(found["q"], heads, size, tp)
        keys, vals = (whole_heads(found[name], groups, size, tp) for name in "kv")
        assert queries == outputs and keys == vals
    else:
        rows = whole_heads(found["qkv"], heads + 2 * groups, size, tp)
        if fused == "thirds":
            place = {("q", i): i for i in range(heads)}
            place |= {("k", i): heads + i for i in range(groups)}
            place |= {("v", i): heads + groups + i for i in range(groups)}
        else:
            width = each + 2
            place = {("q", i): i // each * width + i % each for i in range(heads)}
            place |= {("k", i): i * width + each for i in range(groups)}
            place |= {("v", i): i * width + each + 1 for i in range(groups)}
        held = [{what for what, row in place.items() if row in mine} for mine in rows]
        queries = [sorted(i for kind, i in mine if kind == "q") for mine in held]
        keys = [sorted(i for kind, i in mine if kind == "k") for mine in held]
        vals = [sorted(i for kind, i in mine if kind == "v") for mine in held]
    for query, mine, key, val in zip(queries, outputs, keys, vals):
        assert set(mine) <= set(query), "an output head without its query head"
        needed = {i // each for i in mine}
        assert needed <= set(key) and needed <= set(val), "a query head without its KV head"
    assert set().union(*outputs) == set(range(heads))
    assert set().union(*keys) == set(range(groups)) == set().union(*vals)
    if groups >= tp:
        counts = [len(key) for key in keys]
        assert sum(counts) == groups and max(counts) - min(counts) <= 1
    elif heads > 1:
        counts = [len(mine) for mine in outputs]
        assert sum(counts) == heads and max(counts) - min(counts) <= (1 if not fused else each)


# -- deal_grains against a plain labelling -----------------------------------------------------------------------------


def plain_grains(sizes: tuple[int, ...], edges: list[Edge]) -> list[list[tuple[int, int]]]:
    """Connected sets of (dim, element), in order of their first element."""
    graph: nx.Graph[tuple[int, int]] = nx.Graph()
    graph.add_nodes_from((dim, i) for dim, size in enumerate(sizes) for i in range(size))
    for a, b, (of_a, of_b), _ in edges:
        graph.add_edges_from(((a, int(x)), (b, int(y))) for x, y in zip(of_a, of_b))
    return sorted(sorted(c) for c in nx.connected_components(graph))


def plainly_dealt(sizes: tuple[int, ...], edges: list[Edge], tp: int) -> list[Layout | None]:
    def numbered(grains: list[list[tuple[int, int]]]) -> dict[tuple[int, int], int]:
        return {element: i for i, grain in enumerate(grains) for element in grain}

    grains = plain_grains(sizes, edges)
    grain_of = numbered(grains)
    readers = {grain_of[b, int(y)] for _, b, (_, of_b), cover in edges if cover for y in of_b}
    reads: list[tuple[int, int]] = []  # (grain, grain that reads it)
    if readers and len(readers) < tp:
        grains = plain_grains(sizes, [e for e in edges if not e[3]])
        grain_of = numbered(grains)
        reads = [
            (grain_of[a, int(x)], grain_of[b, int(y)])
            for a, b, (of_a, of_b), cover in edges
            if cover
            for x, y in zip(of_a, of_b)
        ]
    read = {a for a, b in reads if a != b}
    owners: list[set[int]] = [set() for _ in grains]
    groups: dict[frozenset[int], list[int]] = {}
    for i, grain in enumerate(grains):
        if i not in read:
            groups.setdefault(frozenset(dim for dim, _ in grain), []).append(i)
    for members in groups.values():
        if len(members) == 1:
            owners[members[0]] = set(range(tp))
            continue
        share, extra = divmod(len(members), tp)
        queue = iter(members)
        for rank in range(tp):
            for _ in range(share + (rank < extra)):
                owners[next(queue)].add(rank)
    for _ in grains:
        for a, b in reads:
            owners[a] |= owners[b]
    owners = [ranks or set(range(tp)) for ranks in owners]
    found: list[Layout | None] = []
    for dim, size in enumerate(sizes):
        parts = tuple(
            intervals_of([i for i in range(size) if rank in owners[grain_of[dim, i]]]) for rank in range(tp)
        )
        found.append(None if all(part == ((0, size),) for part in parts) else Layout(size, parts))
    return found


@st.composite
def ties(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Edge], int]:
    """Dims tied by the forms that rules have: equal elements, factors of a split, consecutive pieces, repetitions."""
    sizes = tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=4)))
    edges: list[Edge] = []
    for _ in range(draw(st.integers(0, 4))):
        a, b = draw(st.integers(0, len(sizes) - 1)), draw(st.integers(0, len(sizes) - 1))
        if a == b:
            continue
        small, large = sorted((a, b), key=lambda d: sizes[d])
        form = draw(st.sampled_from(["piece", "factor", "cover"]))
        elements = np.arange(sizes[large], dtype=np.int64)
        if form == "piece":
            start = draw(st.integers(0, sizes[large] - sizes[small]))
            own = np.arange(sizes[small], dtype=np.int64)
            edges.append((small, large, (own, own + start), False))
        elif sizes[large] % sizes[small] == 0:
            each = sizes[large] // sizes[small]
            if form == "factor":
                edges.append((large, small, (elements, elements // each), False))
            else:
                edges.append((small, large, (elements // each, elements), True))
    return sizes, edges, draw(st.integers(2, 5))


@settings(max_examples=1000)
@given(ties())
def test_deal_grains_matches_brute_force(given_ties: tuple[tuple[int, ...], list[Edge], int]) -> None:
    sizes, edges, tp = given_ties
    assert deal_grains(sizes, edges, tp) == plainly_dealt(sizes, edges, tp)


@settings(max_examples=1000)
@given(ties())
def test_every_element_has_an_owner_and_no_grain_is_cut(given_ties: tuple[tuple[int, ...], list[Edge], int]) -> None:
    sizes, edges, tp = given_ties
    found = deal_grains(sizes, edges, tp)
    owners = {
        (dim, i): frozenset(
            rank for rank in range(tp) if layout is None or any(a <= i < b for a, b in layout.parts[rank])
        )
        for dim, (size, layout) in enumerate(zip(sizes, found))
        for i in range(size)
    }
    for grain in plain_grains(sizes, [e for e in edges if not e[3]]):
        assert len({owners[element] for element in grain}) == 1
    for a, b, (of_a, of_b), cover in edges:
        if cover:
            assert all(owners[b, int(y)] <= owners[a, int(x)] for x, y in zip(of_a, of_b)), "read by who has it not"
    assert all(owners.values())


@pytest.mark.parametrize("ranks", [2, 3])
def test_pieces_of_a_dim_without_ties_are_cut_independently(ranks: int) -> None:
    """Gate and up in one product: dealt out as one line of grains, rank 0 would have the gate and rank 1 the up."""
    piece = np.arange(6, dtype=np.int64)
    edges: list[Edge] = [(1, 0, (piece, piece), False), (2, 0, (piece, piece + 6), False)]
    whole, gate, up = deal_grains((12, 6, 6), edges, ranks)
    assert gate == up and gate is not None and whole is not None
    assert {gate.local_size(r) for r in range(ranks)} == {6 // ranks}
    assert [whole.local_size(r) for r in range(ranks)] == [12 // ranks] * ranks
