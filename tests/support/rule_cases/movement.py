"""Cases of views, of what moves elements, and of caches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from passes.ops.data_dependent import join_rows, split_rows
from tests.support.rule_cases.case import (
    Case,
    Cases,
    Outputs,
    Share,
    broadcast_to_same,
    dims,
    picked,
    shapes,
    values,
)

CASES = case = Cases()

# -- views and movement ------------------------------------------------------------------------------------------------


@case("permute")
def _permute(data: st.DataObject) -> Case:
    shape = data.draw(shapes)
    kept = [d for d in range(len(shape)) if not (shape[d] == 1 and data.draw(st.booleans()))]  # others: squeezed
    order = data.draw(st.permutations(kept))
    for _ in range(data.draw(st.integers(0, 2))):
        order.insert(data.draw(st.integers(0, len(order))), -1)  # unsqueezed

    def run(x: Sequence[torch.Tensor], share: Share) -> torch.Tensor:
        gone = [d for d in range(len(shape)) if d not in order]
        out = x[0].permute(*[d for d in order if d >= 0], *gone)
        for _ in gone:
            out = out.squeeze(-1)
        for place, d in enumerate(order):
            out = out.unsqueeze(place) if d < 0 else out
        return out

    return Case((values(*shape),), run, {"order": tuple(order)})


@case("expand")
def _expand(data: st.DataObject) -> Case:
    target, source = broadcast_to_same(data, 2)
    return Case((values(*source),), lambda x, share: x[0].broadcast_to((*share.out_shapes, target)[0]))


@case("view")
def _view(data: st.DataObject) -> Case:
    """Runs of factors, each kept as it is, split or merged or both; and ones anywhere."""
    source: list[int] = []
    target: list[int] = []
    for _ in range(data.draw(st.integers(1, 3))):
        factors = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
        form = data.draw(st.sampled_from(["same", "split", "merge", "mixed"]))
        whole = [math.prod(factors)]
        source += whole if form == "split" else factors
        target += {"same": factors, "split": factors, "merge": whole, "mixed": factors[::-1]}[form]
    return Case((values(*source),), lambda x, share: x[0].reshape((*share.out_shapes, target)[0]))


@case("slice")
def _slice(data: st.DataObject) -> Case:
    shape = data.draw(shapes)
    index: list[Any] = []
    kept: list[tuple[int, int, int, int]] = []
    for d, n in enumerate(shape):
        if data.draw(st.integers(0, 3)) == 0:
            index.append(None)
        form = data.draw(st.sampled_from(["whole", "range", "step", "number"]))
        start = data.draw(st.integers(0, n - 1))
        stop = data.draw(st.integers(start + 1, n))
        step = 2 if form == "step" else 1
        if form == "number":
            index.append(start)
            continue
        item = slice(None) if form == "whole" else slice(start, stop, step)
        kept.append((d, len([i for i in index if not isinstance(i, int)]), item.start or 0, step))
        index.append(item)

    def run(x: Sequence[torch.Tensor], share: Share) -> torch.Tensor:
        local, d = [], 0
        for item in index:
            if isinstance(item, slice) and item.start is not None and (0, d) in share.ins:
                held = share.ins[0, d]
                taken = torch.arange(shape[d])[item]
                item = torch.nonzero(torch.isin(held, taken))[:, 0]
            local.append(item)
            d += item is not None
        return x[0][tuple(local)]

    return Case((values(*shape),), run, {"dims": tuple(kept)})


def _with_dim(data: st.DataObject) -> tuple[list[int], int]:
    shape = data.draw(shapes)
    return shape, data.draw(st.integers(0, len(shape) - 1))


@case("split")
def _split(data: st.DataObject) -> Case:
    shape, dim = _with_dim(data)
    pieces = data.draw(st.lists(dims, min_size=1, max_size=4))
    shape[dim] = sum(pieces)

    def run(x: Sequence[torch.Tensor], share: Share) -> Outputs:
        return torch.split(x[0], [s[dim] for s in share.out_shapes] or pieces, dim)

    return Case((values(*shape),), run, {"dim": dim})


@case("cat")
def _cat(data: st.DataObject) -> Case:
    shape, dim = _with_dim(data)
    lengths = data.draw(st.lists(dims, min_size=1, max_size=4))
    inputs = tuple(values(*shape[:dim], n, *shape[dim + 1 :]) for n in lengths)

    def run(x: Sequence[torch.Tensor], share: Share) -> torch.Tensor:
        return torch.cat(list(x), dim)

    return Case(inputs, run, {"dim": dim})


@case("unbind")
def _unbind(data: st.DataObject) -> Case:
    shape, dim = _with_dim(data)
    return Case((values(*shape),), lambda x, share: tuple(x[0].unbind(dim)), {"dim": dim})


@case("stack")
def _stack(data: st.DataObject) -> Case:
    shape, dim = _with_dim(data)
    inputs = tuple(values(*shape) for _ in range(data.draw(st.integers(1, 3))))
    dim += data.draw(st.integers(0, 1))
    return Case(inputs, lambda x, share: torch.stack(list(x), dim), {"dim": dim})


@case("repeat_interleave")
def _repeat_interleave(data: st.DataObject) -> Case:
    shape, dim = _with_dim(data)
    each = data.draw(st.integers(1, 4))

    def run(x: Sequence[torch.Tensor], share: Share) -> torch.Tensor:
        if (0, dim) not in share.outs:
            return x[0].repeat_interleave(each, dim)
        return picked(x[0], share, dim, each, slot=0)

    return Case((values(*shape),), run, {"dim": dim, "repeats": each})


@case("index")
def _index(data: st.DataObject) -> Case:
    """One or two index tensors among whole dims and new ones: together they stand in place, apart in front."""
    shape, form = data.draw(st.lists(dims, min_size=3, max_size=3)), data.draw(st.sampled_from("abcdef"))
    rows = data.draw(dims)
    at = [torch.randint(0, n, (rows,)) for n in shape]
    index, kept = {
        "a": ((0,), [(1, 1), (2, 2)]), "b": ((None, 0), [(1, 2), (2, 3)]), "c": ((0, 1, None), [(2, 2)]),
        "d": ((":", 1), [(0, 0), (2, 2)]), "e": ((0, ":", 2), [(1, 1)]), "f": ((":", 1, 2), [(0, 0)]),
    }[form]  # fmt: skip
    used = [i for i in index if isinstance(i, int)]

    def run(x: Sequence[torch.Tensor], share: Share) -> torch.Tensor:
        tensors = iter(x[1:])
        return x[0][tuple(slice(None) if i == ":" else None if i is None else next(tensors) for i in index)]

    return Case((values(*shape), *(at[i] for i in used)), run, {"dims": tuple(kept)})


@case("index_add")
def _index_add(data: st.DataObject) -> Case:
    shape, dim = _with_dim(data)
    index = torch.randint(0, shape[dim], (data.draw(dims),))
    source = values(*shape[:dim], len(index), *shape[dim + 1 :])
    return Case((values(*shape), index, source), lambda x, share: x[0].index_add(dim, x[1], x[2]), {"dim": dim})


@case("index_put")
def _index_put(data: st.DataObject) -> Case:
    shape, dim = _with_dim(data)
    index = torch.randperm(shape[dim])[: data.draw(st.integers(1, shape[dim]))]
    source = values(*shape[:dim], len(index), *shape[dim + 1 :])
    return Case((values(*shape), index, source), lambda x, share: x[0].index_copy(dim, x[1], x[2]), {"dim": dim})


def _places(data: st.DataObject, shape: list[int], dim: int) -> torch.Tensor:
    """An index for gather or scatter: no place twice along `dim`, other dims as long as they are or shorter."""
    cut = [n if data.draw(st.booleans()) else data.draw(st.integers(1, n)) for n in shape]
    return torch.rand(shape).argsort(dim)[tuple(slice(n) for n in cut)]


@case("gather")
def _gather(data: st.DataObject) -> Case:
    shape, dim = _with_dim(data)
    return Case((values(*shape), _places(data, shape, dim)), lambda x, share: x[0].gather(dim, x[1]), {"dim": dim})


@case("scatter")
def _scatter(data: st.DataObject) -> Case:
    shape, dim = _with_dim(data)
    index, form = _places(data, shape, dim), data.draw(st.sampled_from(["number", "write", "add"]))
    source = () if form == "number" else (values(*index.shape),)

    def run(x: Sequence[torch.Tensor], share: Share) -> torch.Tensor:
        if form == "number":
            return x[0].scatter(dim, x[1], 3.0)
        return (x[0].scatter if form == "write" else x[0].scatter_add)(dim, x[1], x[2])

    return Case((values(*shape), index, *source), run, {"dim": dim, "adds": form == "add"})


@case("split_rows")
def _split_rows(data: st.DataObject) -> Case:
    shape = data.draw(shapes)
    counts = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4)))
    return Case((values(int(counts.sum()), *shape), counts), lambda x, share: split_rows(x[0], x[1], len(counts), 0))


@case("join_rows")
def _join_rows(data: st.DataObject) -> Case:
    shape, counts = data.draw(shapes), data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    pieces = tuple(values(n, *shape) for n in counts)
    return Case((*pieces, torch.tensor(counts)), lambda x, share: join_rows(x[:-1], sum(counts), x[-1]))


@case("cache_update")
def _cache_update(data: st.DataObject) -> Case:
    b, g, s, d, e, past = (data.draw(st.integers(1, 3)) for _ in range(6))
    before = values(b, g, past, d), values(b, g, past, e)

    def run(x: Sequence[torch.Tensor], share: Share) -> Outputs:
        heads = share.ins.get((0, 1), torch.arange(g))
        return tuple(torch.cat([old.index_select(1, heads), new], 2) for old, new in zip(before, x))

    return Case((values(b, g, s, d), values(b, g, s, e)), run, {"layer": 0})


@case("cache_read")
def _cache_read(data: st.DataObject) -> Case:
    b, g, t, d, e = (data.draw(st.integers(1, 3)) for _ in range(5))
    keys, held_values = values(b, g, t, d), values(b, g, t, e)

    def run(x: Sequence[torch.Tensor], share: Share) -> Outputs:
        heads = share.outs.get((0, 1), torch.arange(g))  # of the cache that the rank filled
        return keys.index_select(1, heads), held_values.index_select(1, heads)

    return Case((), run, {"layer": 0})
