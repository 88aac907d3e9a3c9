"""verify: right programs pass, and of wrong ones each kind is refused, with the rank, the node and the reason."""

from __future__ import annotations

import pytest
import torch

import autodist_fx as adx
from cost_model.rules.table import RULES
from passes.verify.core.held import PARTIAL, WHOLE, Held, Judge, Shape, held
from tests.support.graphs.broken_programs import (
    check,
    emitted,
)
from tests.support.models import padded_batch, tiny_model

FAMILIES = ("llama", "gpt2", "opt", "qwen3", "phi3")


@pytest.mark.drawn(4)
@pytest.mark.parametrize("mesh", [(2, 1), (3, 1), (1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("family", (*FAMILIES, "uneven", "tuples"))
def test_right_programs_pass(family: str, mesh: tuple[int, int]) -> None:
    for use_cache in (False, True):
        check(emitted(family, *mesh, use_cache), family, *mesh, use_cache)


def test_loaded_programs_pass() -> None:
    """Weights on a device, in another dtype than they were traced in."""
    model = tiny_model("gpt2")
    made = adx.compile(model, tp=2, pp=2)
    ids, mask = padded_batch()
    made.simulate(input_ids=ids, attention_mask=mask)
    for rank in range(4):
        made.rank(rank).to(torch.bfloat16)
    made.verify()


# -- the rules as typing rules -----------------------------------------------------------------------------------------


def _judged(kind: str, inputs: list[Shape], output: Shape, types: list[Held]) -> tuple[list[Held], str]:
    """Returns what one rank has of the one output, in all ways that the rule allows; and why there is none."""
    judged = Judge()(RULES[kind](inputs, [output], {}), inputs, [output], tuple(types))
    return [d.outputs[0] for d in judged.derivations], judged.reason


def test_a_view_keeps_heads_whole() -> None:
    view = ("view", [(2, 3, 32)], (2, 3, 4, 8))
    assert _judged(*view, [held(2, [(8, 24)], 32)])[0] == [held(2, [(1, 3)], 4)]
    assert _judged(*view, [held(2, [(8, 23)], 32)])[0] == []
    assert "a piece is cut in two" in _judged(*view, [held(2, [(8, 23)], 32)])[1]
    assert _judged(*view, [PARTIAL])[0] == [PARTIAL]


def test_a_linear_is_cut_alike_in_all_its_inputs() -> None:
    linear = ("linear", [(2, 3, 16), (32, 16), (32,)], (2, 3, 32))
    rows, columns = held(0, [(0, 8)], 32), held(1, [(0, 8)], 16)
    assert _judged(*linear, [WHOLE, rows, rows])[0] == [held(2, [(0, 8)], 32)]
    assert _judged(*linear, [held(2, [(0, 8)], 16), columns, WHOLE])[0] == [PARTIAL]
    assert _judged(*linear, [WHOLE, rows, WHOLE])[0] == []  # another part of the bias
    assert _judged(*linear, [held(2, [(1, 9)], 16), columns, WHOLE])[0] == []
    assert _judged(*linear, [held(2, [(0, 8)], 16), rows, rows])[0] == []
    assert _judged(*linear, [PARTIAL, WHOLE, WHOLE])[0] == []  # the bias would be added on every rank


def test_a_sum_goes_through_linear_ops_alone() -> None:
    assert _judged("add", [(2, 8), (2, 8)], (2, 8), [PARTIAL, PARTIAL])[0] == [PARTIAL]
    assert _judged("add", [(2, 8), (2, 8)], (2, 8), [PARTIAL, WHOLE])[0] == []
    assert _judged("silu", [(2, 8)], (2, 8), [PARTIAL])[0] == []
    assert _judged("add", [(2, 8), (2, 8)], (2, 8), [PARTIAL, held(1, [(0, 4)], 8)])[0] == []


def test_attention_reads_the_kv_heads_of_its_queries() -> None:
    shapes: list[Shape] = [(2, 6, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)]
    queries = held(1, [(2, 6)], 6)
    for kv, right in ([(1, 3)], True), ([(0, 2)], False), ([(0, 3)], False), ([(1, 2)], False):
        own = held(1, kv, 3)
        assert _judged("sdpa", shapes, (2, 6, 5, 8), [queries, own, own])[0] == ([queries] if right else [])


def test_held_is_normalized() -> None:
    assert held(0, [(0, 4), (4, 8)], 8) == WHOLE
    assert held(0, [(0, 2), (2, 4), (6, 6)], 8) == Held(0, ((0, 4),))
    assert held(0, [(4, 8), (0, 4)], 8) == Held(0, ((4, 8), (0, 4)))  # all of it, in another order
