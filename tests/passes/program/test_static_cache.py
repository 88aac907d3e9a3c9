"""static_cache: lengths become the cache's size where they are sizes, a tensor where they are numbers."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from cost_model.errors import PlanError
from passes.fx import node_meta
from passes.fx.text import graph_text
from passes.program.static_cache import static_cache


class _Graph:
    """A graph with token ids [B, S], a mask [B, T] and a cache; nodes have the values that normalising leaves."""

    def __init__(self) -> None:
        self.graph = torch.fx.Graph()
        self.ids = self._input("input_ids", ("B", "S"), (11, 23))
        self.mask = self._input("attention_mask", ("B", "T"), (11, 52))
        self.cache = self.graph.placeholder("past_key_values")

    def _input(self, name: str, symbols: tuple[str, ...], shape: tuple[int, ...]) -> torch.fx.Node:
        return self._of(self.graph.placeholder(name), symbols, shape)

    def _of(self, node: torch.fx.Node, symbols: tuple[str, ...], shape: tuple[int, ...]) -> torch.fx.Node:
        node_meta.set_val(node, torch.empty(shape, dtype=torch.long, device="meta"))
        node_meta.set_symbols(node, symbols)
        return node

    def size(self, tensor: torch.fx.Node, dim: int) -> torch.fx.Node:
        return self.graph.call_function(torch.ops.aten.sym_size.int, (tensor, dim))

    def tensor(self, symbols: tuple[str, ...], target: Any, *args: Any) -> torch.fx.Node:
        sizes = {"B": 11, "S": 23, "T": 52, "": 1}
        return self._of(self.graph.call_function(target, args), symbols, tuple(sizes[s] for s in symbols))

    def module(self, y: torch.fx.Node) -> torch.fx.GraphModule:
        self.graph.output({"y": y})
        return torch.fx.GraphModule(nn.Module(), self.graph)


def _causal() -> torch.fx.GraphModule:
    """y [B, S, T]: which tokens each may see; and the last position's padding."""
    g = _Graph()
    past, total = g.graph.call_method("get_seq_length", (g.cache, 0)), g.size(g.mask, 1)
    steps = g.tensor(("S",), torch.arange, g.size(g.ids, 1))
    queries = g.tensor(("S", ""), operator.getitem, g.tensor(("S",), operator.add, steps, past), (slice(None), None))
    seen = g.tensor(("S", "T"), operator.le, g.tensor(("T",), torch.arange, total), queries)
    padding = g.tensor(("B", "", "T"), operator.getitem, g.mask, (slice(None), None))
    seen = g.tensor(("B", "S", "T"), operator.mul, padding, seen)
    new = g.tensor(("B", ""), operator.getitem, g.mask, (slice(None), slice(-1, None)))
    new = g.tensor(("B", "", ""), operator.getitem, new, (..., None))
    return g.module(g.tensor(("B", "S", "T"), operator.mul, seen, new))


class _Cache:
    def get_seq_length(self, layer: int) -> int:
        return 3


def test_a_mask_for_a_cache_with_room() -> None:
    module = _causal()
    made = static_cache(module, 8)
    assert_expected_inline(graph_text(made), """\
input_ids : i64[B, S] = input
attention_mask : i64[B, T] = input
past_key_values = input
past_tokens : i64[] = input
getattr_1 = getattr(past_tokens, 'device')
arange : i64[S] = arange(1)
add : i64[S] = add(arange, past_tokens)
getitem : i64[S, 1] = getitem(add, (:, None))
arange_1 : i64[T] = arange(0, 8)
le : i64[S, T] = le(arange_1, getitem)
getitem_1 : i64[B, 1, T] = getitem(attention_mask, (:, None))
mul : i64[B, S, T] = mul(getitem_1, le)
arange_2 : i64[1] = arange(1, device=getattr_1)
add_1 : i64[1] = add(arange_2, past_tokens)
getitem_2 : i64[B, 1] = getitem(attention_mask, (:, add_1))
getitem_3 : i64[B, 1, 1] = getitem(getitem_2, (..., None))
mul_1 : i64[B, S, T] = mul(mul, getitem_3)
return {y: mul_1}""")
    ids, mask = torch.ones(2, 1, dtype=torch.long), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    wanted = module(ids, mask, _Cache())["y"]
    found = made(ids, nn.functional.pad(mask, (0, 4)), _Cache(), past_tokens=torch.tensor(3))["y"]
    assert torch.equal(found[..., :4], wanted) and not found[..., 4:].any()


@pytest.mark.parametrize("use", ["a size", "a product", "a bound"])
def test_other_uses_of_a_length_are_refused_by_name(use: str) -> None:
    g = _Graph()
    past = g.graph.call_method("get_seq_length", (g.cache, 0))
    if use == "a size":
        y = g.tensor(("B",), torch.zeros, past)
    elif use == "a product":
        y = g.tensor(("B",), torch.arange, g.graph.call_function(operator.mul, (past, g.size(g.ids, 0))))
    else:
        y = g.tensor(("B", "T"), operator.getitem, g.mask, (slice(None), slice(None, past)))
    with pytest.raises(PlanError, match=r"reads how many tokens are cached, and .*: such a program has"):
        static_cache(g.module(y), 8)
