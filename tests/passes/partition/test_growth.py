"""Compiling takes time in proportion to layers and experts: in calls of functions, which no other load changes."""

from __future__ import annotations

import cProfile
from collections import Counter

import pytest
from torch.fx import Node

import autodist_fx as adx
from passes.fx.shape_propagation import ShapeInterpreter
from tests.support.moe import tiny_moe_model


def calls(**sizes: int) -> int:
    """Counts the calls of all functions, while a model is traced, planned, emitted for two ranks, and verified."""
    model = tiny_moe_model("qwen3_moe", **sizes)
    profile = cProfile.Profile()
    profile.runcall(adx.compile, model, tp=2, use_cache=True)
    return sum(entry.callcount for entry in profile.getstats())


@pytest.mark.drawn(1)
@pytest.mark.parametrize("size", ["num_hidden_layers", "num_experts"])
def test_each_layer_and_expert_takes_as_much_as_the_one_before(size: str) -> None:
    calls(num_hidden_layers=1)  # fills what is cached for the process
    few, more, most = (calls(**{"num_hidden_layers": 1, size: n}) for n in (2, 4, 6))
    assert most - more <= 1.01 * (more - few)  # 0 where a layer's experts are one node


def test_each_node_runs_once_per_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the model divides lengths, which is why a run comes before the others (bending_points)."""
    ran: Counter[Node] = Counter()
    run_node = ShapeInterpreter.run_node

    def counted(interpreter: ShapeInterpreter, node: Node) -> object:
        ran[node] += 1
        return run_node(interpreter, node)

    monkeypatch.setattr(ShapeInterpreter, "run_node", counted)
    adx.compile(tiny_moe_model("qwen3_moe"), tp=2)
    assert set(ran.values()) == {2}  # the examples are two
