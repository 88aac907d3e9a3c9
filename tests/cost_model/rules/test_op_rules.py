"""Every op rule is proven by running the op on real shards, gluing the results and comparing with the whole op.

For each kind there is a case: torch code for the op, and a strategy that draws shapes and attributes. A rule's factor
is tried with any dealing of its elements to ranks, uneven, empty and out of order, since that is what a rule claims:
that the op falls apart along the factor. Float64 throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_model.graph.op_graph import Op, TensorSpec
from cost_model.rules.rule import DimLink, Factor, OpRule
from cost_model.rules.table import RULES, RuleTable
from tests.support.rule_cases import arithmetic, movement
from tests.support.rule_cases.case import (
    Case,
    Outputs,
    Share,
)
from tests.support.rule_cases.images import IMAGE_CASES

CASES = {
    **arithmetic.CASES,
    **movement.CASES,
    **{kind: lambda data, kind=kind: Case(*IMAGE_CASES[kind](data)) for kind in IMAGE_CASES},
}


def rule_of(kind: str, made: Case, outputs: Outputs) -> OpRule:
    """By way of the table that the searches use, which also shows that the attributes can be hashed."""

    def specs(tensors: Sequence[torch.Tensor]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in tensors)

    return RuleTable()(Op("op", kind, (), specs(outputs), made.attrs), specs(made.inputs))


def elements_of(link: DimLink, held: np.ndarray, size: int, ranks: int, rank: int) -> torch.Tensor:
    """Elements of the link's dim that go with the factor's elements `held`. What belongs to none of them (the rest of
    a sliced dim) may lie anywhere: it is dealt out in turns."""
    if link.pairs is None:
        return torch.from_numpy(held)
    own, factor = link.pairs
    if not link.cover:
        assert len(np.unique(own)) == len(own), "an element of this dim belongs to two of the factor's"
    mine = np.unique(own[np.isin(factor, held)])
    rest = np.setdiff1d(np.arange(size), own)
    return torch.from_numpy(np.sort(np.concatenate([mine, rest[rest % ranks == rank]])))


def shares_of(made: Case, outputs: Outputs, factor: Factor, owner: np.ndarray, ranks: int) -> list[Share]:
    found = []
    for rank in range(ranks):
        held = np.flatnonzero(owner == rank)
        share = Share(rank, factor=factor.name)
        for links, tensors, own in ((factor.inputs, made.inputs, share.ins), (factor.outputs, outputs, share.outs)):
            for link in links:
                size = tensors[link.slot].shape[link.dim]
                if link.pairs is None:
                    assert size == factor.size, f"dim {link.dim} of tensor {link.slot} is not of the factor's size"
                own[link.slot, link.dim] = elements_of(link, held, size, ranks, rank)
        cut = [list(t.shape) for t in outputs]
        for (slot, dim), elements in share.outs.items():
            cut[slot][dim] = len(elements)
        share.out_shapes = tuple(tuple(s) for s in cut)
        found.append(share)
    return found


def local_inputs(made: Case, share: Share) -> list[torch.Tensor]:
    local = list(made.inputs)
    for (slot, dim), elements in share.ins.items():
        local[slot] = local[slot].index_select(dim, elements)
    return local


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def check_factor(made: Case, outputs: Outputs, factor: Factor, owner: np.ndarray, ranks: int) -> None:
    shares = shares_of(made, outputs, factor, owner, ranks)
    results = [made(local_inputs(made, share), share) for share in shares]
    linked = {link.slot: link.dim for link in factor.outputs}
    for slot, expected in enumerate(outputs):
        parts = [result[slot] for result in results]
        if slot in linked:
            dim, glued = linked[slot], torch.zeros_like(expected)
            filled = torch.zeros(expected.shape[dim], dtype=torch.long)
            for share, part in zip(shares, parts):
                elements = share.outs[slot, dim]
                assert part.shape[dim] == len(elements)
                glued.index_copy_(dim, elements, part)
                filled[elements] += 1
            assert (filled == 1).all(), "an output element is made by no rank, or by two"
            assert_equal(glued, expected)
        elif factor.reduces:
            assert_equal(torch.stack(parts).sum(0), expected)
        else:
            pytest.fail(f"factor {factor.name} says nothing of output {slot}")


@pytest.mark.drawn(30)
@pytest.mark.filterwarnings("ignore:std.*degrees of freedom")  # a rank without elements
@pytest.mark.parametrize("kind", CASES)
@settings(max_examples=30)
@given(data=st.data())
def test_every_factor_falls_apart(kind: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 9)))
    made = CASES[kind](data)
    outputs = made(made.inputs, Share())
    ranks = data.draw(st.integers(2, 4))
    for factor in rule_of(kind, made, outputs).factors:
        deal = st.lists(st.integers(0, ranks - 1), min_size=factor.size, max_size=factor.size)
        check_factor(made, outputs, factor, np.array(data.draw(deal), dtype=np.int64), ranks)


@pytest.mark.drawn(30)
@pytest.mark.parametrize("kind", CASES)
@settings(max_examples=15)
@given(data=st.data())
def test_sums_over_ranks_go_through_what_is_linear(kind: str, data: st.DataObject) -> None:
    """`linear_in` names inputs which, when all are sums still owed, leave the outputs as sums still owed."""
    torch.manual_seed(data.draw(st.integers(0, 9)))
    made = CASES[kind](data)
    outputs = made(made.inputs, Share())
    for slots in rule_of(kind, made, outputs).linear_in:
        first = [torch.randn_like(x) if i in slots else x for i, x in enumerate(made.inputs)]
        second = [x - a if i in slots else x for i, (x, a) in enumerate(zip(made.inputs, first))]
        for a, b, expected in zip(made(first, Share()), made(second, Share()), outputs):
            torch.testing.assert_close(a + b, expected, rtol=1e-10, atol=1e-10)


def test_every_rule_has_a_case_and_every_case_a_rule() -> None:
    assert set(CASES) == set(RULES)


_GROUPS = {n: {"groups": n, "transposed": False} for n in (1, 2)}


# Rules that have nothing to say are proven by everything above: these say what must be there.
@pytest.mark.parametrize(
    "kind, inputs, outputs, attrs, factors",
    [
        ("linear", [(2, 3, 8), (6, 8), (6,)], [(2, 3, 6)], {"transposed": False}, {"d0", "d1", "column", "row"}),
        ("embedding", [(2, 3), (9, 4)], [(2, 3, 4)], {}, {"vocab", "hidden"}),
        ("sdpa", [(2, 6, 3, 8), (2, 2, 5, 8), (2, 2, 5, 8)], [(2, 6, 3, 8)], {}, {"heads"}),
        ("matmul", [(2, 3, 4), (2, 4, 5)], [(2, 3, 5)], {}, {"d0", "m", "n", "k"}),
        ("view", [(2, 3, 12)], [(2, 3, 4, 3)], {}, {"d0", "d1", "g2.0", "g2.1"}),
        ("view", [(2, 3, 4, 3)], [(2, 3, 12)], {}, {"d0", "d1", "g2.0", "g2.1"}),
        ("softmax", [(2, 3, 4)], [(2, 3, 4)], {"dims": (-1,)}, {"d0", "d1"}),
        ("cross_entropy", [(6, 9), (6,)], [()], {"reduction": "sum"}, {"d0", "classes"}),
        ("cross_entropy", [(6, 9), (6,)], [()], {"reduction": "mean"}, {"classes"}),
        ("cross_entropy", [(6, 9, 4), (6, 4)], [(6, 4)], {"reduction": "none"}, {"d0", "d2", "classes"}),
        ("reduce", [(2, 3)], [(2,)], {"op": "mean", "dims": (-1,), "keepdim": False}, {"d0", "sum1"}),
        ("reduce", [(2, 3)], [(2,)], {"op": "amax", "dims": (-1,), "keepdim": False}, {"d0"}),
        ("split", [(2, 9)], [(2, 3)] * 3, {"dim": 1}, {"d0", "split"}),
        ("cat", [(2, 3)] * 3, [(2, 9)], {"dim": 1}, {"d0", "cat"}),
        ("repeat_interleave", [(2, 3)], [(2, 6)], {"dim": 1, "repeats": 2}, {"d0", "repeat"}),
        ("slice", [(2, 9)], [(2, 3)], {"dims": ((0, 0, 0, 1), (1, 1, 3, 1))}, {"d0", "d1"}),
        ("slice", [(2, 9)], [(2, 5)], {"dims": ((0, 0, 0, 1), (1, 1, 0, 2))}, {"d0", "d1"}),
        ("index", [(5, 3), (4,)], [(4, 3)], {"dims": ((1, 1),)}, {"d1"}),
        ("index_add", [(5, 3), (4,), (4, 3)], [(5, 3)], {"dim": 0}, {"d1"}),
        ("index_put", [(5, 3), (4,), (4, 3)], [(5, 3)], {"dim": 0}, {"d1"}),
        ("gather", [(5, 3), (5, 2)], [(5, 2)], {"dim": 1}, {"d0"}),
        ("scatter", [(5, 3), (5, 2), (5, 2)], [(5, 3)], {"dim": 1, "adds": False}, {"d0"}),
        ("split_rows", [(5, 3), (2,)], [(1, 3), (4, 3)], {}, {"d1"}),
        ("join_rows", [(1, 3), (4, 3), (2,)], [(5, 3)], {}, {"d1"}),
        ("cache_update", [(2, 3, 4, 5)] * 2, [(2, 3, 9, 5)] * 2, {"layer": 0}, {"heads"}),
        ("layer_norm", [(2, 3, 4), (4,), (4,)], [(2, 3, 4)], {"normalized": 1}, {"d0", "d1"}),
        ("mul", [(2, 3), (3,)], [(2, 3)], {}, {"d0", "d1"}),
        ("expand", [(2, 1, 3)], [(2, 4, 3)], {}, {"d0", "d1", "d2"}),
        ("permute", [(2, 3, 4)], [(4, 1, 2, 3)], {"order": (2, -1, 0, 1)}, {"d0", "d2", "d3"}),
        ("stack", [(2, 3)] * 2, [(2, 2, 3)], {"dim": 1}, {"d0", "d1"}),
        ("unbind", [(2, 3)], [(3,)] * 2, {"dim": 0}, {"d1"}),
        ("conv", [(2, 6, 9, 9), (8, 6, 3, 3), (8,)], [(2, 8, 7, 7)], _GROUPS[1], {"d0", "column", "row"}),
        ("conv", [(2, 6, 9, 9), (8, 3, 3, 3)], [(2, 8, 7, 7)], _GROUPS[2], {"d0", "groups"}),
        ("batch_norm", [(2, 6, 9), (6,), (6,)], [(2, 6, 9)], {"statistics": True}, {"c", "d0", "d2"}),
        ("batch_norm", [(2, 6, 9)], [(2, 6, 9)], {"statistics": False}, {"c"}),
        ("group_norm", [(2, 6, 9), (6,), (6,)], [(2, 6, 9)], {"groups": 3}, {"d0", "groups"}),
        ("pool", [(2, 6, 9, 9)], [(2, 6, 1, 1)], {"spatial": 2, "linear": True}, {"d0", "d1"}),
        ("opaque.unknown", [(2, 3)], [(2, 3)], {}, set()),
    ],
)
def test_factors_that_must_be_there(
    kind: str,
    inputs: list[tuple[int, ...]],
    outputs: list[tuple[int, ...]],
    attrs: dict[str, Any],
    factors: set[str],
) -> None:
    op = Op("op", kind, (), tuple(TensorSpec(s, "float32") for s in outputs), attrs)
    rule = RuleTable()(op, tuple(TensorSpec(s, "float32") for s in inputs))
    assert {factor.name for factor in rule.factors} == factors


def test_no_factor_where_a_step_or_a_regrouping_mixes_elements() -> None:
    specs = TensorSpec((4, 6), "float32"), TensorSpec((6, 4), "float32")
    assert RuleTable()(Op("op", "view", (), (specs[1],)), (specs[0],)).factors == ()


def test_equal_ops_share_one_rule() -> None:
    """Layers repeat: the layouts are solved once only if the factors' arrays are the same objects."""
    table, spec = RuleTable(), TensorSpec((2, 12), "float32")
    ops = [Op(name, "view", (), (TensorSpec((2, 3, 4), "float32"),)) for name in "ab"]
    assert table(ops[0], (spec,)) is table(ops[1], (spec,))
