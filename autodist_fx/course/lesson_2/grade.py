"""The tests of lesson 2. The truth is eager torch for the graphs, and all ways to cut for the cuts."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, symbolic_trace

from autodist_fx.course.grading import Check
from autodist_fx.course.ranks import on_ranks

COSTS = ([1, 1, 1, 3], [5, 1, 1, 1, 1], [2, 3, 1, 4, 1, 1, 2], [1, 9, 1], [3, 1, 2, 2, 6, 1, 1, 2])


class Skipping(nn.Module):
    """A model in which what the first linear gives is read twice, and so is its weight, by different stages."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6, dtype=torch.float64) for _ in range(3))
        self.scale = nn.Parameter(torch.rand(6, dtype=torch.float64))

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        first = self.first(x)
        second = self.second(torch.relu(first)) * self.scale
        third = self.third(second + bias)
        return torch.nn.functional.linear(third + first, self.first.weight) * self.scale


def _inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    return rows[:3], rows[3:]


def _whole() -> GraphModule:
    torch.manual_seed(0)
    return symbolic_trace(Skipping())


def _slowest(seconds: list[int], cuts: list[int]) -> float:
    return max(sum(seconds[a:b]) for a, b in pairwise([0, *cuts, len(seconds)]))


def best_cuts(answer: Any) -> None:
    for seconds in COSTS:
        for stages in range(1, min(4, len(seconds)) + 1):
            cuts = answer.choose_cuts(list(seconds), stages)
            said, count = f"choose_cuts({seconds}, {stages}) is {cuts}", stages - 1
            assert isinstance(cuts, list) and len(cuts) == count, f"{said}: {count} cuts are wanted, in a list"
            in_order = all(a < b for a, b in pairwise([0, *cuts, len(seconds)]))
            assert in_order, f"{said}: each stage has one layer at least, and cuts are in order"
            ways = combinations(range(1, len(seconds)), stages - 1)
            best = min(ways, key=lambda way: _slowest(seconds, list(way)))
            slowest, least = _slowest(seconds, cuts), _slowest(seconds, list(best))
            assert slowest == least, f"{said}: its slowest stage takes {slowest}, and {least} with {list(best)}"


def _placed(whole: GraphModule, first_nodes: tuple[str, ...]) -> dict[str, int]:
    stage_of: dict[str, int] = {}
    stage = 0
    for node in whole.graph.nodes:
        if node.op not in ("placeholder", "get_attr"):
            stage += node.name in first_nodes
            stage_of[node.name] = stage
    return stage_of


def right_hops(answer: Any) -> None:
    whole = _whole()
    values = answer.example_values(whole, *_inputs())
    hops = answer.find_hops(whole, _placed(whole, ("relu", "add_1")), values)
    got = sorted((hop.value, hop.source, hop.target) for hop in hops)
    wanted = [("first", 0, 1), ("first", 0, 2), ("third", 1, 2)]
    assert got == wanted, f"the hops are {got}, and not {wanted}"
    assert len({hop.channel for hop in hops}) == 3, f"channels {[hop.channel for hop in hops]} are not different ones"
    for hop in hops:
        assert tuple(hop.shape) == (3, 6) and hop.dtype == torch.float64, f"{hop.value} is [3, 6] of float64, not {hop}"


def hops_once(answer: Any) -> None:
    whole = _whole()
    values = answer.example_values(whole, *_inputs())
    everything_else = [node.name for node in whole.graph.nodes if node.name not in ("x", "bias")]
    stage_of = {name: 0 if name == "first" else 1 for name in everything_else if name in _placed(whole, ())}
    hops = [(hop.value, hop.source, hop.target) for hop in answer.find_hops(whole, stage_of, values)]
    assert hops == [("first", 0, 1)], f"stage 1 reads first in two places, and the hops are {hops}: one is enough"


def own_nodes(answer: Any) -> None:
    whole = _whole()
    stage_of = _placed(whole, ("relu", "add_1"))
    for stage in range(3):
        part = answer.extract_stage(whole, stage_of, stage)
        part.graph.lint()
        got = [node.name for node in part.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
        wanted = [name for name, at in stage_of.items() if at == stage and name != "output"]
        assert got == wanted, f"stage {stage} has the nodes {got}, and not {wanted}"
    inputs = {node.name for node in part.graph.nodes if node.op == "placeholder"}
    assert inputs == {"x", "bias", "first", "third"}, f"the last stage's placeholders are {sorted(inputs)}"


def own_weights(answer: Any) -> None:
    whole = _whole()
    part = answer.extract_stage(whole, _placed(whole, ("relu", "add_1")), 1)
    held = sorted(dict(part.named_parameters()))
    wanted = ["scale", "second.bias", "second.weight", "third.bias", "third.weight"]
    assert held == wanted, f"stage 1 holds {held}, and not {wanted}"


def same_result(answer: Any) -> None:
    whole, inputs = _whole(), _inputs()
    wanted = whole(*inputs).detach()
    for first_nodes in (("relu",), ("relu", "add_1"), ("second", "third", "add_1")):
        stages = answer.split(whole, list(first_nodes), *inputs)
        ranks = len(stages)
        got = _run(stages, inputs)
        assert isinstance(got[-1], torch.Tensor), f"the last of {ranks} ranks returns {got[-1]!r}, and not a tensor"
        difference = float((got[-1] - wanted).detach().abs().max())
        assert difference < 1e-9, f"over {ranks} ranks the result differs from the whole model's by {difference:.2g}"
        assert got[:-1] == [None] * (ranks - 1), "only the last rank returns something"


def _run(stages: list[GraphModule], inputs: tuple[torch.Tensor, ...]) -> list[Any]:
    return on_ranks(lambda rank: stages[rank](*inputs), pp=len(stages))


CHECKS = (
    Check("the slowest stage is as fast as it can be", best_cuts),
    Check("each tensor that is read behind a cut crosses it", right_hops),
    Check("a tensor crosses once for each stage that reads it", hops_once),
    Check("a stage has its own nodes, and placeholders for what it reads", own_nodes),
    Check("a stage holds its own weights alone", own_weights),
    Check("two, three and four ranks compute what the whole model computes", same_result),
)
