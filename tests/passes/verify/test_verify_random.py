"""verify: A mask that is drawn for other elements than the rank holds, or otherwise than the model's op, is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from torch.fx import Node

import autodist_fx as adx
from autodist_fx.api.compiled_model import CompiledModel
from cost_model.errors import VerificationError
from passes.ops.random import seeded_dropout
from passes.partition.pipeline import emit_rank
from passes.verify.verify import verify
from tests.support.graphs.broken_programs import Programs, calls
from tests.support.models import tiny_model


@functools.cache
def compiled() -> CompiledModel:
    model = tiny_model("gpt2", n_layer=1).train()
    return adx.compile(model, tp=2, train=True, input_names=("input_ids", "labels"))


def draws(programs: Programs) -> list[Node]:
    """Every rank's mask of attention, which is cut by heads."""
    return [next(n for n in calls(p, seeded_dropout) if len(n.args) > 6 and n.args[6][0] == 1) for p in programs]


def replace(node: Node, at: int, value: Any) -> None:
    node.args = (*node.args[:at], value, *node.args[at + 1 :])


def _of_the_other_rank(nodes: list[Node]) -> None:
    replace(nodes[1], 6, nodes[0].args[6])


def _of_the_first_elements(nodes: list[Node]) -> None:
    """As if what the rank holds were a tensor of its own."""
    for node in nodes:
        node.args = node.args[:6]


def _of_a_longer_dim(nodes: list[Node]) -> None:
    for node in nodes:
        replace(node, 6, (1, 7, node.args[6][2]))


def _with_another_number(nodes: list[Node]) -> None:
    replace(nodes[1], 2, 3)


def _with_another_rate(nodes: list[Node]) -> None:
    for node in nodes:
        replace(node, 3, 0.2)


def _with_rows_along_another_dim(nodes: list[Node]) -> None:
    for node in nodes:
        replace(node, 5, (2, 1, 1))


MUTANTS = {
    _of_the_other_rank: r"rank 1 .*draws the mask of S\(1\) with elements 0:3 of 6, and holds S\(1\) with elements 3:6",
    _of_the_first_elements: r"rank 0 .*draws the mask of whole \(R\), and holds S\(1\) with elements 0:3",
    _of_a_longer_dim: r"rank 0 .*draws the mask of S\(1\) with elements 0:3 of 7, and holds S\(1\)",
    _with_another_number: r"rank 1 .*is called with .*, 3, 0.1, .*, and the model calls it with .*, 1, 0.1",
    _with_another_rate: r"rank 0 .*'p': 0.2.* where the model has .*'p': 0.1",
    _with_rows_along_another_dim: r"rank 0 .*is called with .*\(2, 1, 1\)",
}


@pytest.mark.parametrize("change", MUTANTS, ids=lambda f: f.__name__.strip("_"))
def test_wrong_masks_are_refused(change: Callable[[list[Node]], None]) -> None:
    model = compiled()
    programs = [emit_rank(model.graph, model.plan, rank, train=True) for rank in range(2)]
    verify(programs, model.plan, model.op_graph, model.graph)
    change(draws(programs))
    with pytest.raises(VerificationError, match=MUTANTS[change]):
        verify(programs, model.plan, model.op_graph, model.graph)
