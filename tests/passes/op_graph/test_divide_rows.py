"""divide_rows: which graphs compute each row of a batch by itself. The truth is the graph run on some of the rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from passes.op_graph.build import build_op_graph
from passes.op_graph.divide_rows import divide_rows
from passes.program.row_division import RowDivision
from tests.support.graphs.small import normalized

ROWS, CUT = 7, 3
FIXED = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def arange(size: Any) -> Any:
    """`torch.arange(size)`, where torch.fx sees it though no tensor is among its arguments."""
    return size.tracer.create_proxy("call_function", torch.arange, (size,), {})


class Expression(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("table", FIXED.clone())

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"y": self.function(self, x)}


def division_of(function: Callable[..., Any]) -> tuple[RowDivision, torch.fx.GraphModule]:
    """The rows of an expression of x [B, S, 6, 4], and its graph."""
    whole = normalized(Expression(function), x=("B", "S", 6, 4))
    return divide_rows(whole, build_op_graph(whole)), whole


def is_true(division: RowDivision, whole: torch.fx.GraphModule) -> bool:
    """Whether the graph gives, of some rows, these rows of what it gives of all."""
    x = torch.randn(ROWS, 5, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together, parts = whole(x=x)["y"], [whole(x=part)["y"] for part in x.split([CUT, ROWS - CUT])]
    return torch.allclose(torch.cat(parts, division.outputs["y"]), together, rtol=1e-12, atol=1e-12)


ROW_BY_ROW: dict[str, Callable[..., Any]] = {
    "elementwise": lambda m, x: F.gelu(x * 2 + 1),
    "product with a table": lambda m, x: F.linear(x, m.table),
    "softmax of a row": lambda m, x: x.softmax(1),
    "sum over tokens": lambda m, x: x.sum((1, 3)),
    "attention": lambda m, x: F.scaled_dot_product_attention(*[x.transpose(1, 2)] * 3, is_causal=True),
    "rows by tokens": lambda m, x: x.reshape(-1, 24).cumsum(-1).reshape(x.shape[0], x.shape[1], 24),
    "rows by tokens are given": lambda m, x: x.reshape(-1, 24) * 2,
    "rows behind": lambda m, x: x.permute(1, 2, 3, 0) * 3,
    "as many ones as rows": lambda m, x: x + x.new_ones(x.shape[0], 1, 1, 1),
    "a table for each": lambda m, x: x + m.table[None, :1].expand(x.shape[0], 1, 1, 4),
    "the last token": lambda m, x: x[arange(x.shape[0]), -1],
    "a token of each row": lambda m, x: x[arange(x.shape[0]), x.sum((2, 3)).argmax(-1)],
    "the best of a row": lambda m, x: x.topk(2, dim=-1)[0],
    "concatenated": lambda m, x: torch.cat([x, x.flip(1)], 2),
    "pieces of a row": lambda m, x: x.split(2, dim=2)[1] @ x.transpose(2, 3)[..., :2],
    "differences": lambda m, x: x.diff(dim=1, prepend=x[:, :1] - 1),
    "norm": lambda m, x: F.layer_norm(x, (4,)),
    "a mean of tokens": lambda m, x: x / x.shape[1],
}
ACROSS: dict[str, Callable[..., Any]] = {
    "mean of the batch": lambda m, x: x - x.mean(0),
    "sum of all": lambda m, x: x.sum(),
    "softmax over rows": lambda m, x: x.softmax(0),
    "order of rows": lambda m, x: x.flip(0),
    "sum so far": lambda m, x: x.cumsum(0),
    "rows with rows": lambda m, x: x.flatten(1) @ x.flatten(1).t(),
    "attention over rows": lambda m, x: F.scaled_dot_product_attention(*[x.transpose(0, 2)] * 3),
    "divided by the number of rows": lambda m, x: x / x.shape[0],
    "numbers of rows": lambda m, x: x + arange(x.shape[0])[:, None, None, None],
    "numbers of rows are given": lambda m, x: arange(x.shape[0]) + 0 * x.sum((1, 2, 3)).long(),
    "rows shifted": lambda m, x: x.roll(1, 0),
    "the first row": lambda m, x: x + x[:1],
    "rows by another order": lambda m, x: x[x.sum((1, 2, 3)).argsort()],
    "tokens by rows": lambda m, x: x.transpose(0, 1).reshape(-1, 6, 4).cumsum(-1),
    "the best of all rows": lambda m, x: x.topk(2, dim=0)[0],
    "variance of all": lambda m, x: x / x.std(),
    "pairs of rows": lambda m, x: x.sum((1, 2, 3))[:, None] - x.sum((1, 2, 3))[None],
    "an op without a rule": lambda m, x: torch.linalg.matrix_exp(x[..., :4, :4]),
    "as many as rows": lambda m, x: x + x.new_full((1,), x.shape[0]),
    "a matrix of rows": lambda m, x: x.new_ones(x.shape[0], x.shape[0]),
}


@pytest.mark.parametrize("function", ROW_BY_ROW.values(), ids=ROW_BY_ROW)
def test_rows_are_followed(function: Callable[..., Any]) -> None:
    division, whole = division_of(function)
    assert division.reason == "" and division.inputs == {"x": 0}
    assert is_true(division, whole)


@pytest.mark.parametrize("function", ACROSS.values(), ids=ACROSS)
def test_what_goes_across_rows_is_refused_and_said(function: Callable[..., Any]) -> None:
    division, _ = division_of(function)
    assert division.reason and not division.outputs
