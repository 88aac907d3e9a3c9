"""The tests of lesson 1. The truth is the whole model, run by eager torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import symbolic_trace

from autodist_fx.course.grading import Check
from autodist_fx.course.ranks import messages, on_ranks
from passes.ops.comm import recv, send

ROWS = 3


class Front(nn.Module):
    """The first half of a model, whose result is a node called "relu"."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.first(x))


class Back(nn.Module):
    """The second half, which reads that result twice."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(8, 8, dtype=torch.float64)

    def forward(self, relu: torch.Tensor) -> torch.Tensor:
        return self.second(relu) + relu


class Two(nn.Module):
    """A front that makes two tensors of one shape."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x) + torch.cos(x)


class Minus(nn.Module):
    """A back that reads both, and minds which is which."""

    def forward(self, sin: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
        return sin - 2 * cos


class Pass(nn.Module):
    """A rank in the middle, which has nothing to do with what goes over it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def _x() -> torch.Tensor:
    return torch.randn(ROWS, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def same_result(answer: Any) -> None:
    front, back = Front(), Back()
    wanted = back(front(_x())).detach()
    hops = [answer.Hop("relu", source=0, target=1, channel=0, shape=(ROWS, 8))]
    stages = [symbolic_trace(front), symbolic_trace(back)]
    for rank, stage in enumerate(stages):
        answer.insert_send_recv(stage, rank, hops)
    got = on_ranks(lambda rank: stages[rank](*([_x()] if rank == 0 else [])), pp=2)[1]
    _assert_close(got, wanted, "rank 1's result")


def one_message(answer: Any) -> None:
    stages = [symbolic_trace(Front()), symbolic_trace(Back())]
    hop = answer.Hop("relu", source=0, target=1, channel=0, shape=(ROWS, 8))
    for rank, stage in enumerate(stages):
        answer.insert_send_recv(stage, rank, [hop])
    said = messages(lambda rank: stages[rank](*([_x()] if rank == 0 else [])), pp=2)
    assert said[1]["recv of float64[3, 8]"] == 1, f"rank 1 receives {said[1].total()} tensors; it reads one, twice"
    assert said[0].total() == 1, f"rank 0 sends {said[0].total()} tensors; one is wanted"


def sent_at_once(answer: Any) -> None:
    stage = symbolic_trace(Two())
    answer.insert_send(stage, answer.Hop("sin", source=0, target=1, channel=0, shape=(ROWS, 6)))
    names = [getattr(node.target, "__name__", node.op) for node in stage.graph.nodes]
    wanted = ["placeholder", "sin", "send", "cos", "add", "output"]
    names = [name if node.op == "call_function" else node.op for name, node in zip(names, stage.graph.nodes)]
    assert names == wanted, f"the nodes are {', '.join(names)}; the send belongs right behind sin, for rank 1 waits"


def no_input_left(answer: Any) -> None:
    stage = symbolic_trace(Back())
    answer.insert_recv(stage, answer.Hop("relu", source=0, target=1, channel=5, shape=(ROWS, 8)))
    stage.graph.lint()
    left = [node.name for node in stage.graph.nodes if node.op == "placeholder"]
    assert not left, f"the graph still has the input {left[0]}: nobody will pass it"
    found = [node for node in stage.graph.nodes if node.target is recv]
    assert len(found) == 1, f"{len(found)} recv nodes; one is wanted"
    given = dict(zip(("shape", "dtype", "device", "source", "channel"), found[0].args)) | dict(found[0].kwargs)
    wanted = {"shape": (ROWS, 8), "dtype": torch.float64, "device": "cpu", "source": 0, "channel": 5}
    for name, value in wanted.items():
        found_value = tuple(given["shape"]) if name == "shape" and "shape" in given else given.get(name)
        assert found_value == value, f"recv is called with {name}={found_value}, and not {value}"


def channels(answer: Any) -> None:
    sin = answer.Hop("sin", source=0, target=1, channel=7, shape=(ROWS, 6))
    cos = answer.Hop("cos", source=0, target=1, channel=3, shape=(ROWS, 6))
    stages = [symbolic_trace(Two()), symbolic_trace(Minus())]
    answer.insert_send_recv(stages[0], 0, [sin, cos])
    answer.insert_send_recv(stages[1], 1, [cos, sin])
    got = on_ranks(lambda rank: stages[rank](*([_x()] if rank == 0 else [])), pp=2)[1]
    _assert_close(got, _x().sin() - 2 * _x().cos(), "sin - 2 cos, of two tensors that cross together,")


def over_a_rank(answer: Any) -> None:
    front, back = Front(), Back()
    hops = [answer.Hop("relu", source=0, target=2, channel=0, shape=(ROWS, 8))]
    stages = [symbolic_trace(front), symbolic_trace(Pass()), symbolic_trace(back)]
    for rank, stage in enumerate(stages):
        answer.insert_send_recv(stage, rank, hops)
    got = on_ranks(lambda rank: stages[rank](*([_x()] if rank < 2 else [])), pp=3)[2]
    _assert_close(got, back(front(_x())), "rank 2's result, of a tensor that passes rank 1 by,")


def stays_in(answer: Any) -> None:
    stage = symbolic_trace(Two())
    answer.insert_send(stage, answer.Hop("sin", source=0, target=1, channel=0, shape=(ROWS, 6)))
    stage.graph.eliminate_dead_code()
    sends = [node for node in stage.graph.nodes if node.target is send]
    assert len(sends) == 1, "the send is gone after eliminate_dead_code: call passes.ops.comm.send itself"
    args = dict(zip(("x", "to", "channel"), sends[0].args)) | dict(sends[0].kwargs)
    assert getattr(args.get("x"), "name", "") == "sin", "what is sent is not the node called sin"


def _assert_close(got: Any, wanted: torch.Tensor, what: str) -> None:
    assert isinstance(got, torch.Tensor), f"{what} is {got!r}, and not a tensor"
    difference = float((got - wanted).detach().abs().max())
    assert difference < 1e-9, f"{what} differs from the whole model's by {difference:.2g}"


CHECKS = (
    Check("two ranks compute what the whole model computes", same_result),
    Check("a tensor that is read twice is sent once and received once", one_message),
    Check("a tensor is sent as soon as it is there", sent_at_once),
    Check("what is received is no input of the graph any more", no_input_left),
    Check("two tensors that cross together are kept apart by their channels", channels),
    Check("a tensor may pass a rank by", over_a_rank),
    Check("the send outlives the removal of dead code", stays_in),
)
