"""Graphs as JSON: what is written reads back, and nothing else is ever called."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.fx
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from passes.serialize.read_graph import graph_from_json
from passes.serialize.targets import functions, names
from passes.serialize.values import GraphFormatError
from passes.serialize.write_graph import graph_to_json

_PLAIN = (
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False)
    | st.text("abc ()'\";\\", max_size=8) | st.sampled_from([torch.float32, torch.bool, torch.device("cpu"), Ellipsis])
    | st.builds(slice, st.none() | st.integers(-9, 9), st.none() | st.integers(-9, 9))
)  # fmt: skip
_VALUES = st.recursive(_PLAIN, lambda v: st.lists(v, max_size=3) | st.tuples(v, v), max_leaves=6)


def _graph(value: Any) -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output({"y": x, "value": value})
    return torch.fx.GraphModule(nn.Module(), graph)


def _read(data: Any) -> torch.fx.GraphModule:
    return graph_from_json(json.loads(json.dumps(data, allow_nan=False)), lambda *_: torch.empty(0))


@given(_VALUES)
def test_every_argument_reads_back_as_what_it_was(value: Any) -> None:
    module = _read(graph_to_json(_graph(value)))
    found = module(1)["value"]
    assert repr(found) == repr(value)  # also types: 1, 1.0 and True are equal, and other things to torch
    assert module.code == _graph(value).code


def test_a_function_has_one_name_that_finds_it() -> None:
    assert all(functions()[name] is function or functions()[name] == function for function, name in names().items())
    words = {part for name in functions() for part in name.split(".")}
    assert not words & {"load", "save", "eval", "exec", "compile", "open", "system", "from_file", "apply", "set"}
    assert not any(part.startswith("_") for part in words)


def test_tied_and_shared_tensors_stay_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x))

    module = torch.fx.symbolic_trace(Tied())
    found = graph_from_json(graph_to_json(module), lambda name, *_: module.get_parameter(name))
    assert found.one.weight is found.two.weight
    x = torch.randn(3, 2)
    assert torch.equal(found(x), module(x))


@pytest.mark.parametrize("value", [{1: 2}, {"a b": 1}, 1j, torch.ones(1)], ids=["key", "name", "complex", "tensor"])
def test_what_no_file_can_hold_is_not_written(value: Any) -> None:
    with pytest.raises(GraphFormatError, match="output has an argument of type"):
        graph_to_json(_graph(value))


def test_a_layer_with_a_class_of_its_own_is_named() -> None:
    class Own(nn.Linear):
        pass

    graph = torch.fx.Graph()
    graph.output(graph.call_module("own", (graph.placeholder("x"),)))
    module = torch.fx.GraphModule({"own": Own(2, 2)}, graph)
    with pytest.raises(GraphFormatError, match=r"own calls own, a .*test_graph_json\..*Own, which has no place"):
        graph_to_json(module)
