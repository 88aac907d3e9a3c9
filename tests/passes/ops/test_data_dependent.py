"""Lengths that depend on values: made up on meta, real otherwise, and never taken for another length."""

from __future__ import annotations

import operator

import pytest
import torch

from cost_model.errors import PlanError
from cost_model.graph.op_graph import TensorSpec
from cost_model.graph.symbols import length
from passes.fx.shape_propagation import Example, Sizes
from passes.normalize.pipeline import normalize
from passes.ops.data_dependent import bincount, expectation, join_rows, made_up_length, selected, split_rows


def test_real_tensors_are_selected_and_split_as_torch_does() -> None:
    mask = torch.tensor([[0, 1, 0], [1, 0, 1]])
    for mine, theirs in zip(selected(mask, 7, 4), torch.where(mask), strict=True):
        assert torch.equal(mine, theirs)
    x, counts = torch.arange(12.0).view(6, 2), torch.tensor([2, 0, 4])
    pieces = split_rows(x, counts, 3, 0)
    assert [len(p) for p in pieces] == [2, 0, 4]
    assert torch.equal(join_rows(pieces, 6, counts), x)
    assert torch.equal(bincount(torch.tensor([1, 1, 3]), 5), torch.tensor([0, 2, 0, 1, 0]))


def test_on_meta_no_two_calls_have_the_same_length() -> None:
    mask = torch.empty(2, 15, device="meta")
    rows, columns = selected(mask, 0, 4)
    other, _ = selected(mask, 1, 4)
    assert rows.shape == columns.shape != other.shape and rows.dtype == torch.long
    x, counts = torch.empty(30, 2, device="meta"), torch.empty(3, device="meta")
    pieces = split_rows(x, counts, 3, 2)
    assert len({len(p) for p in pieces}) == 3
    assert join_rows(pieces, 30, counts).shape == x.shape


def test_what_is_selected_of_rows_may_be_viewed_row_by_row() -> None:
    for rows in (2, 13, 23):
        found = selected(torch.empty(rows, 7, device="meta"), 5, 1)[0]
        assert found.view(rows, -1).shape[0] == rows
        assert expectation(len(found)) == (7 * rows, 1)


def test_a_made_up_length_says_what_to_expect() -> None:
    assert expectation(made_up_length(30, 12_345, 8)) == (30, 8)
    sizes = Sizes({"B": 3, "S": 5}, {"B": 7, "S": 11})
    symbol = sizes.symbol(made_up_length(30, 3, 8), made_up_length(154, 3, 8))
    assert symbol.endswith("~B*S*2/8")
    assert length(symbol, 0, {"B": 2, "S": 64}) == 2 * 64 * 2 // 8
    assert length(symbol, 0, {"B": 1, "S": 1}) == 1  # never nothing at all
    spec = TensorSpec((made_up_length(30, 3, 8), 16), "float32", (symbol, ""))
    assert spec.at({"B": 1, "S": 128}).shape == (32, 16)


def test_a_choice_among_constants_is_refused() -> None:
    """Both example sizes give the same made-up length: it would be taken for a constant."""

    def graph_of(mask_name: str) -> torch.fx.GraphModule:
        graph = torch.fx.Graph()
        inputs = {name: graph.placeholder(name) for name in ("x", "weight")}
        rows = graph.call_function(selected, (inputs[mask_name], 0, 1))
        first = graph.call_function(operator.getitem, (rows, 0))
        graph.output({"rows": graph.call_function(torch.neg, (first,))})
        return torch.fx.GraphModule(torch.nn.Module(), graph)

    def example(batch: int) -> Example:
        return Example({"x": torch.empty(batch, device="meta"), "weight": torch.empty(8, device="meta")}, {"B": batch})

    normalize(graph_of("x"), (example(5), example(7)))
    with pytest.raises(PlanError, match="does not follow the inputs"):
        normalize(graph_of("weight"), (example(5), example(7)))
