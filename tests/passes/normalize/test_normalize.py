"""normalize: one spelling, nothing constant left, and the same values at every size."""

from __future__ import annotations

import copy
import operator
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from passes.fx import node_meta
from passes.fx.shape_propagation import Example
from passes.fx.text import graph_text
from passes.normalize.pipeline import normalize
from tests.support.graphs.small import Ids, examples, traced


def normalized(module: nn.Module, **inputs: Any) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
    """Before and after; having checked that both compute the same at sizes other than the examples'."""
    before = traced(module)
    after = normalize(copy.deepcopy(before), examples(inputs))
    for batch, seq in ((2, 5), (1, 1), (3, 23)):
        lengths = {"B": batch, "S": seq}
        given_inputs = {}
        for name, shape in inputs.items():
            sizes = [lengths[n] if isinstance(n, str) else n for n in getattr(shape, "shape", shape)]
            ids = isinstance(shape, Ids)
            given_inputs[name] = torch.randint(0, 4, sizes) if ids else torch.randn(sizes, dtype=torch.float64)
        expected = before(**{name: value.clone() for name, value in given_inputs.items()})
        found = after(**given_inputs)
        for name, value in expected.items():
            assert torch.equal(found[name], value), f"{name} at {lengths}"
    return before, after


class Heads(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        shape = x.size()
        q = x.view(shape[0], shape[1], -1, 4).transpose(1, 2)
        return {"y": q.contiguous().view(shape[0], 3, -1)}


def test_view_sizes_are_literals_or_size_nodes() -> None:
    """Constants as literals, lengths as nodes right behind the inputs; no arithmetic on sizes is left."""
    before, after = normalized(Heads(), x=("B", "S", 12))
    assert_expected_inline(graph_text(before), """\
x = input
size = .size(x)
getitem = getitem(size, 0)
getitem_1 = getitem(size, 1)
view = .view(x, getitem, getitem_1, -1, 4)
transpose = .transpose(view, 1, 2)
contiguous = .contiguous(transpose)
getitem_2 = getitem(size, 0)
view_1 = .view(contiguous, getitem_2, 3, -1)
return {y: view_1}""")
    assert_expected_inline(graph_text(after), """\
x : f64[B, S, 12] = input
batch = sym_size.int(x, 0)
seq = sym_size.int(x, 1)
view : f64[B, S, 3, 4] = reshape(x, (batch, seq, 3, 4))
transpose : f64[B, 3, S, 4] = .transpose(view, 1, 2)
view_1 : f64[B, 3, S*4] = reshape(transpose, (batch, 3, -1))
return {y: view_1}""")


class NoOps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.same = nn.Dropout(0.1), nn.Identity()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.same(self.drop(x)).contiguous().to(torch.float64) * 1
        x = nn.functional.dropout(x, 0.1, training=False)
        return {"y": x[:, :, :].expand(x.shape).view(x.shape[0], -1, 12) / 1.0 + 0.5}


def test_no_ops_are_removed() -> None:
    before, after = normalized(NoOps(), x=("B", "S", 12))
    assert len(before.graph.nodes) > 12
    assert_expected_inline(graph_text(after), """\
x : f64[B, S, 12] = input
add : f64[B, S, 12] = add(x, 0.5)
return {y: add}""")


class Repeated(nn.Module):
    """As every model of Hugging Face repeats KV heads."""

    def forward(self, k: torch.Tensor) -> dict[str, torch.Tensor]:
        batch, heads, seq, size = k.shape[0], k.shape[1], k.shape[2], k.shape[3]
        k = k[:, :, None, :, :].expand(batch, heads, 3, seq, size)
        return {"y": k.reshape(batch, heads * 3, seq, size)}


def test_repeated_kv_heads_become_one_op() -> None:
    before, after = normalized(Repeated(), k=("B", 2, "S", 4))
    assert_expected_inline(graph_text(before), """\
k = input
getattr_1 = getattr(k, 'shape')
getitem = getitem(getattr_1, 0)
getattr_2 = getattr(k, 'shape')
getitem_1 = getitem(getattr_2, 1)
getattr_3 = getattr(k, 'shape')
getitem_2 = getitem(getattr_3, 2)
getattr_4 = getattr(k, 'shape')
getitem_3 = getitem(getattr_4, 3)
getitem_4 = getitem(k, (:, :, None, :, :))
expand = .expand(getitem_4, getitem, getitem_1, 3, getitem_2, getitem_3)
mul = mul(getitem_1, 3)
reshape = .reshape(expand, getitem, mul, getitem_2, getitem_3)
return {y: reshape}""")
    assert_expected_inline(graph_text(after), """\
k : f64[B, 2, S, 4] = input
reshape : f64[B, 6, S, 4] = repeat_interleave(k, 3, 1)
return {y: reshape}""")


class Twice(nn.Module):
    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        rows, columns = ids.new_ones(ids.shape[1]).cumsum(0), ids.new_ones(ids.shape[1]).cumsum(0)
        number, kind = ids + 1, ids + 1.0
        return {"y": (rows[:, None] >= columns[None, :]) & (ids + 1 > 1)[:, None, :], "n": number, "k": kind}


def test_equal_computations_become_one() -> None:
    """Equal numbers of other types, 1 and 1.0, are not equal to torch."""
    _, after = normalized(Twice(), ids=Ids("B", "S"))
    assert_expected_inline(graph_text(after), """\
ids : i64[B, S] = input
seq = sym_size.int(ids, 1)
new_ones : i64[S] = .new_ones(ids, seq)
cumsum : i64[S] = .cumsum(new_ones, 0)
add : i64[B, S] = add(ids, 1)
add_1 : f32[B, S] = add(ids, 1.0)
getitem_2 : i64[S, 1] = getitem(cumsum, (:, None))
getitem_3 : i64[1, S] = getitem(cumsum, (None, :))
ge : bool[S, S] = ge(getitem_2, getitem_3)
gt : bool[B, S] = gt(add, 1)
getitem_4 : bool[B, 1, S] = getitem(gt, (:, None, :))
and_ : bool[B, S, S] = and_(ge, getitem_4)
return {y: and_, n: add, k: add_1}""")


class Random(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"a": torch.rand_like(x), "b": torch.rand_like(x), "c": nn.functional.dropout(x, 0.5, True)}


def test_random_numbers_are_drawn_as_often_as_before() -> None:
    after = normalize(traced(Random()), examples({"x": ("B", 3)}))
    assert_expected_inline(graph_text(after), """\
x : f64[B, 3] = input
random_state : i64[3] = input
sym_size_int = sym_size.int(x, 0)
rand_like : f64[B, 3] = seeded_uniform(random_state, 0, (sym_size_int, 3), torch.float64, 0.0, 1.0, (0, 1, 1))
rand_like_1 : f64[B, 3] = seeded_uniform(random_state, 1, (sym_size_int, 3), torch.float64, 0.0, 1.0, (0, 1, 1))
dropout : f64[B, 3] = seeded_dropout(x, random_state, 2, 0.5, 2, (0, 1, 1))
return {a: rand_like, b: rand_like_1, c: dropout}""")


def written() -> torch.fx.GraphModule:
    """old = mask + 1; mask[:, 0] = 7; mask += 1; mask.mul_(2); y = x + mask"""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    mask = graph.call_function(torch.zeros_like, (x,))
    old = graph.call_function(operator.add, (mask, 1))
    graph.call_function(operator.setitem, (mask, (slice(None), 0), 7.0))
    graph.call_function(operator.iadd, (mask, 1))
    graph.call_method("mul_", (mask, 2))
    y = graph.call_function(operator.add, (x, mask))
    graph.output({"y": y, "old": old})
    return torch.fx.GraphModule(nn.Module(), graph)


def test_writes_become_values() -> None:
    """Reads before a write keep its value; reads after it have the new one."""
    before = written()
    after = normalize(written(), examples({"x": ("B", "S")}))
    x = torch.randn(2, 5, dtype=torch.float64)
    for name, value in after(x).items():
        expected = {"y": x + torch.tensor([16.0, 2, 2, 2, 2]), "old": torch.ones_like(x)}[name]
        assert torch.equal(value, expected)
        assert torch.equal(before(x)[name], expected)
    assert_expected_inline(graph_text(before), """\
x = input
zeros_like = zeros_like(x)
add = add(zeros_like, 1)
setitem = setitem(zeros_like, (:, 0), 7.0)
iadd = iadd(zeros_like, 1)
mul_ = .mul_(zeros_like, 2)
add_1 = add(x, zeros_like)
return {y: add_1, old: add}""")
    assert_expected_inline(graph_text(after), """\
x : f64[B, S] = input
zeros_like : f64[B, S] = zeros_like(x)
add : f64[B, S] = add(zeros_like, 1)
setitem : f64[B, S] = with_item(zeros_like, (:, 0), 7.0)
iadd : f64[B, S] = add(setitem, 1)
mul_ : f64[B, S] = .mul(iadd, 2)
add_1 : f64[B, S] = add(x, mul_)
return {y: add_1, old: add}""")


class Regrouped(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x.view(x.shape[0], 23, -1), "z": x.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)}


def test_a_dim_that_happens_to_be_an_examples_length() -> None:
    """From [B, S, 23] to [B, 23, S]: the same shape where S is 23, as it is in the first example."""
    before = traced(Regrouped())
    after = normalize(copy.deepcopy(before), examples({"x": ("B", "S", 23)}))
    for seq in (1, 5, 23):
        x = torch.randn(2, seq, 23, dtype=torch.float64)
        for name, value in before(x).items():
            assert torch.equal(after(x)[name], value), f"{name} of {seq} tokens"


def test_cache_update_loses_its_rotary_tables() -> None:
    class Updates(nn.Module):
        def forward(self, x: torch.Tensor, cache: Any, cache_position: torch.Tensor) -> dict[str, torch.Tensor]:
            kv = cache.update(x, x, 0, {"sin": x.sin(), "cos": x.cos(), "cache_position": cache_position})
            return {"y": kv[0]}

    class Cache:
        def update(self, k: torch.Tensor, v: torch.Tensor, layer: int, more: Any) -> tuple[torch.Tensor, ...]:
            return k, v

    inputs = {"x": ("B", 2, "S", 4), "cache": lambda lengths: Cache(), "cache_position": Ids("S")}
    after = normalize(traced(Updates()), examples(inputs))
    assert_expected_inline(graph_text(after), """\
x : f64[B, 2, S, 4] = input
cache = input
cache_position : i64[S] = input
update = .update(cache, x, x, 0, {cache_position: cache_position})
getitem : f64[B, 2, S, 4] = getitem(update, 0)
return {y: getitem}""")


# -- any program -------------------------------------------------------------------------------------------------------

# Each takes and returns [B, S, 6, 4], in ways that models do.
STEPS = {
    "flatten": lambda x: x.reshape(x.shape[0] * x.shape[1], -1).view(x.shape[0], x.shape[1], 6, 4),
    "heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "merge": lambda x: x.reshape(*[x.shape[i] for i in range(2)], 24).unflatten(-1, (6, 4)),
    "half": lambda x: torch.cat([-x[..., 2:], x[..., : x.shape[-1] // 2]], dim=-1),
    "tokens": lambda x: x[:, : x.size(1)] + x[:, -1:, :, :],
    "length": lambda x: x * (x.shape[1] + 1) / x.size(-1),
    "mean": lambda x: x - x.mean(-1, keepdim=True).expand(x.shape),
    "cast": lambda x: x.float().to(x.dtype) + x.type_as(x),
    "repeat": lambda x: x[:, :, :3, None].expand(x.shape[0], x.shape[1], 3, 2, 4).reshape(x.shape),
    "positions": lambda x: x + x.new_ones(x.shape[1]).cumsum(0)[None, :, None, None].to(x.dtype),
    "ones": lambda x: x * (x.new_ones(x.shape[1], dtype=torch.bool) & (x[0, :, 0, 0] > 0))[:, None, None],
    "wide": lambda x: x + (x.new_ones(x.shape[:2], dtype=torch.bool) & (x[:, :1, 0, 0] > 0)).sum(1).view(-1, 1, 1, 1),
    "rows": lambda x: x[:, x.new_zeros(x.shape[1], dtype=torch.long)],
    "write": lambda x: torch.zeros_like(x).add_(x).mul_(0.5),
    "split": lambda x: torch.stack([x.split(2, dim=-1)[0], x.chunk(2, -1)[1]], dim=-1).flatten(-2),
}  # fmt: skip


class Program(nn.Module):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        for name in self.names:
            x = STEPS[name](x)
        return {"y": x, "length": x.shape[1] * torch.ones(1)}


@settings(max_examples=60)
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=6))
def test_any_program_computes_the_same(names: list[str]) -> None:
    _, after = normalized(Program(names), x=("B", "S", 6, 4))
    for node in after.graph.nodes:
        assert node_meta.has_val(node) or node.op == "output"
        if node_meta.is_tensor(node):
            assert len(node_meta.symbols(node)) == node_meta.tensor(node).dim()


class Chunks(nn.Module):
    """Pads to chunks of 8 and asks a tensor how many there are."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        padded = nn.functional.pad(x, (0, 0, 0, (8 - x.shape[1] % 8) % 8))
        chunks = padded.view(x.shape[0], -1, 8, 4).sum(2)
        return {"y": nn.functional.pad(chunks, (0, 0, 1, 0)), "ones": x.new_ones(chunks.shape[1] + 1)}


@pytest.mark.parametrize("lengths", [(23, 48), (16, 48)])
def test_numbers_of_chunks_are_computed_of_the_inputs_lengths(lengths: tuple[int, int]) -> None:
    """Also where both examples are multiples, as a guard may want them."""
    before = traced(Chunks())
    made = [
        Example({"x": torch.empty(b, s, 4, dtype=torch.float64, device="meta")}, {"B": b, "S": s})
        for b, s in zip((11, 13), lengths, strict=True)
    ]
    after = normalize(copy.deepcopy(before), (made[0], made[1]))
    read = [n.args[0] for n in after.graph.nodes if n.target is torch.ops.aten.sym_size.int]
    assert read and all(source.op == "placeholder" for source in read)
    for length in (8, 40) if lengths[0] == 16 else (5, 8, 40):
        x = torch.randn(2, length, 4, dtype=torch.float64)
        found = after(x=x)
        for name, value in before(x=x).items():
            assert torch.equal(found[name], value)


class CalledByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(3, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = nn.functional.linear(x, bias=self.bias, weight=self.weight)
        return {"y": y.max(dim=-1).values}


def test_keyword_arguments_and_named_tuples_are_canonicalized() -> None:
    _, after = normalized(CalledByName(), x=("B", "S", 4))
    assert_expected_inline(graph_text(after), """\
x : f64[B, S, 4] = input
bias : f64[3] = bias
weight : f64[3, 4] = weight
linear : f64[B, S, 3] = linear(x, weight, bias)
max_1 = .max(linear, dim=-1)
getattr_1 : f64[B, S] = getitem(max_1, 0)
return {y: getattr_1}""")


class CalledAsNumpyDoes(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": torch.cat((x.sum(axis=-1, keepdims=True), torch.softmax(x, axis=1)), axis=-1)}


def test_numpy_argument_names_become_torchs() -> None:
    _, after = normalized(CalledAsNumpyDoes(), x=("B", "S", 4))
    assert_expected_inline(graph_text(after), """\
x : f64[B, S, 4] = input
sum_1 : f64[B, S, 1] = .sum(x, dim=-1, keepdim=True)
softmax : f64[B, S, 4] = softmax(x, dim=1)
cat : f64[B, S, 5] = cat([sum_1, softmax], dim=-1)
return {y: cat}""")
