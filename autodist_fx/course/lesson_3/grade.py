"""The tests of lesson 3. The truth is nn.Linear, and an MLP of two of them, run by eager torch."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.nn import functional as F

from autodist_fx.course.grading import Check
from autodist_fx.course.ranks import on_ranks
from passes.ops.comm import all_reduce


def _linear(inputs: int, outputs: int, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(inputs * 10 + outputs)
    return nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64)


def _x(width: int) -> torch.Tensor:
    return torch.randn(2, 3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(width))


def _slices(size: int, tp: int) -> list[slice]:
    """Slices of our own, uneven, so that the linears are graded without `share`."""
    ends = [size * n * n // tp**2 for n in range(tp + 1)]
    return [slice(a, b) for a, b in pairwise(ends)]


def shares(answer: Any) -> None:
    for size in (1, 4, 7, 12):
        for tp in (1, 2, 3, 4):
            parts = [answer.share(size, rank, tp) for rank in range(tp)]
            rows = [list(range(size))[part] for part in parts]
            said = f"share({size}, 0..{tp - 1}, {tp}) deals {rows}"
            assert [row for own in rows for row in own] == list(range(size)), f"{said}: not each row once, in order"
            counts = [len(own) for own in rows]
            assert max(counts) - min(counts) <= 1, f"{said}: not as equal as can be"
            assert counts == sorted(counts, reverse=True), f"{said}: the first ranks have the larger shares"


def columns(answer: Any) -> None:
    for bias in (True, False):
        linear, x = _linear(4, 7, bias=bias), _x(4)
        got = [answer.ColumnParallelLinear(linear, part)(x) for part in _slices(7, 3)]
        said = f"the outputs side by side, {'with' if bias else 'without'} bias,"
        _assert_close(torch.cat(got, -1), linear(x), said)


def rows(answer: Any) -> None:
    for bias in (True, False):
        linear, x = _linear(7, 4, bias=bias), _x(7)
        parts = _slices(7, 3)
        got = sum(answer.RowParallelLinear(linear, part, rank)(x[..., part]) for rank, part in enumerate(parts))
        over = float((got - linear(x)).detach().abs().max())
        times = bias and torch.allclose(got - linear(x), 2 * linear.bias)
        assert not times, "the sum over three ranks has the bias three times"
        assert over < 1e-9, f"the sum, {'with' if bias else 'without'} bias, differs from the linear's by {over:.2g}"


def memory(answer: Any) -> None:
    linear = _linear(8, 8)
    layers = {
        "ColumnParallelLinear": answer.ColumnParallelLinear(linear, slice(2, 4)),
        "RowParallelLinear": answer.RowParallelLinear(linear, slice(2, 4), 1),
    }
    for name, layer in layers.items():
        held = layer.weight.untyped_storage().nbytes()
        assert held <= 16 * 8, (
            f"a quarter of a weight keeps {held} bytes in {name}, and {16 * 8} would do: a slice of a tensor keeps "
            "all of it alive, unless it is copied"
        )


def trainable(answer: Any) -> None:
    linear, x = _linear(4, 6), _x(4)
    layer = answer.ColumnParallelLinear(linear, slice(0, 3))
    layer(x).sum().backward()
    names = sorted(name for name, p in layer.named_parameters() if p.grad is not None)
    assert names == ["bias", "weight"], f"gradients reach {names}, and not ['bias', 'weight']: both are nn.Parameters"
    assert linear.weight.grad is None, "the whole linear got a gradient: its part is not one of its own"


class Mlp(nn.Module):
    """An MLP as one rank has it: column parallel, GELU, row parallel, and the input added."""

    def __init__(self, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(F.gelu(self.up(x)))
        return x + y * y.sigmoid()


class Ends(nn.Module):
    """A model that ends in a row parallel linear."""

    def __init__(self, down: nn.Module) -> None:
        super().__init__()
        self.down = down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(x)


def _ranks(answer: Any) -> list[GraphModule]:
    up, down = _linear(4, 7), _linear(7, 4)
    found = []
    for rank, part in enumerate(_slices(7, 2)):
        columns, rows = answer.ColumnParallelLinear(up, part), answer.RowParallelLinear(down, part, rank)
        found.append(answer.trace(Mlp(columns, rows)))
        answer.insert_all_reduce(found[-1])
    return found


def whole_mlp(answer: Any) -> None:
    graphs, x = _ranks(answer), _x(4)
    wanted = Mlp(_linear(4, 7), _linear(7, 4))(x)
    for rank, got in enumerate(on_ranks(lambda rank: graphs[rank](x.clone()), tp=2)):
        _assert_close(got, wanted, f"the MLP on rank {rank} of 2")


def one_sum(answer: Any) -> None:
    graph = _ranks(answer)[0].graph
    sums = [node for node in graph.nodes if node.target is all_reduce]
    assert len(sums) == 1, f"{len(sums)} all_reduces; one is wanted, behind the row parallel linear"
    read = sums[0].all_input_nodes[0]
    assert read.target == "down", f"the all_reduce adds up {read.name}, and not what `down` gives"
    assert list(read.users) == [sums[0]], f"{read.name} is still read by {[user.name for user in read.users][:3]}"


def at_the_end(answer: Any) -> None:
    linear, x = _linear(7, 4), _x(7)
    parts = _slices(7, 2)
    graphs = [answer.trace(Ends(answer.RowParallelLinear(linear, part, rank))) for rank, part in enumerate(parts)]
    for graph in graphs:
        answer.insert_all_reduce(graph)
    for got in on_ranks(lambda rank: graphs[rank](x[..., parts[rank]]), tp=2):
        _assert_close(got, linear(x), "a sum that the model returns")


def _assert_close(got: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    assert got.shape == wanted.shape, f"{what} is {list(got.shape)}, and not {list(wanted.shape)}"
    difference = float((got - wanted).detach().abs().max())
    assert difference < 1e-9, f"{what} differs by {difference:.2g}"


CHECKS = (
    Check("shares cover each row once, and are as equal as can be", shares),
    Check("column parallel: the ranks' outputs, side by side, are the linear's", columns),
    Check("row parallel: the ranks' outputs, added up, are the linear's", rows),
    Check("a rank holds its own part of the weight, and no more", memory),
    Check("a part can be trained, and the whole stays as it is", trainable),
    Check("an MLP over two ranks gives on each what the whole gives", whole_mlp),
    Check("it takes one all_reduce, and everyone reads its result", one_sum),
    Check("a sum that the model returns is added up, too", at_the_end),
)
