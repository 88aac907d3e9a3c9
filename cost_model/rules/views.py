"""Rules of views, and of ops that move elements or put tensors together, computed from the shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cost_model.rules.rule import (
    DimLink,
    Factor,
    IntArray,
    OpRule,
    RuleFunction,
    Shape,
    broadcast_factors,
    passing,
    repeat_pairs,
)


def permute(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """x [...] -> x with its dims in another order: output dim j is input dim `order[j]`.

    -1 marks a new dim of size 1 (unsqueeze); dims that are missing were squeezed.
    """
    x = inputs[0]
    factors = [passing(0, 0, x, d, j) for j, d in enumerate(attrs["order"]) if d >= 0]
    return OpRule(tuple(factors), ((0,),))


def expand(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """x [...] -> x broadcast to the output's shape. A dim that is made by repeating one element is a factor that runs
    through no input: each rank makes as many as it has."""
    kept = broadcast_factors(inputs[:1], outputs[0])
    through = {link.dim for factor in kept for link in factor.outputs}
    made = [Factor(f"d{d}", n, (), (DimLink(0, d),)) for d, n in enumerate(outputs[0]) if d not in through and n > 1]
    return OpRule((*kept, *made), ((0,),))


def view_groups(source: Shape, target: Shape) -> list[tuple[list[int], list[int]]]:
    """Returns the finest pairs of (input dims, output dims) with equal products, left to right: [2,3,4] -> [6,4] gives
    ([0,1],[0]), ([2],[1]). Raises ValueError when the element counts differ."""
    if math.prod(source) != math.prod(target):
        raise ValueError(f"cannot view {list(source)} as {list(target)}")
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(source) and j < len(target):
        ins, outs = [i], [j]
        a, b = source[i], target[j]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a *= source[i]
                ins.append(i)
                i += 1
            else:
                b *= target[j]
                outs.append(j)
                j += 1
        groups.append((ins, outs))
    # dims that are left over on one side have size 1
    if groups:
        groups[-1][0].extend(range(i, len(source)))
        groups[-1][1].extend(range(j, len(target)))
    return groups


def _mixed_pairs(outer: int, n: int, inner: int) -> tuple[IntArray, IntArray]:
    """Returns the pairs of a dim of outer * n * inner elements with the middle one of the three coordinates."""
    elements = np.arange(outer * n * inner, dtype=np.int64)
    return elements, (elements // inner) % n


def view(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """x [...] -> x with dims split or merged; each piece of a split dim, or each dim that merges, is a factor."""
    source, target = inputs[0], outputs[0]
    if math.prod(source) == 0:
        return OpRule((), ((0,),))
    factors: list[Factor] = []
    for number, (ins, outs) in enumerate(view_groups(source, target)):
        if len(ins) == 1 and len(outs) == 1:
            factors.append(passing(0, 0, source, ins[0], outs[0]))
        elif len(ins) == 1 or len(outs) == 1:
            split = len(ins) == 1  # one dim into many; else many into one
            one, many = (ins[0], outs) if split else (outs[0], ins)
            sizes = [(target if split else source)[d] for d in many]
            for k, d in enumerate(many):
                pairs = _mixed_pairs(math.prod(sizes[:k]), sizes[k], math.prod(sizes[k + 1 :]))
                mixed, plain = DimLink(0, one, pairs), DimLink(0, d)
                links = ((mixed,), (plain,)) if split else ((plain,), (mixed,))
                factors.append(Factor(f"g{number}.{k}", sizes[k], *links, alternatives=f"g{number}"))
    return OpRule(tuple(factors), ((0,),))


def slice_(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """x [...] -> x[i, a:b:c]; `dims` lists (input dim, output dim, start, step) of the dims that remain."""
    x, out = inputs[0], outputs[0]
    factors = []
    for in_dim, out_dim, start, step in attrs["dims"]:
        n = out[out_dim]
        if n == x[in_dim]:
            factors.append(passing(0, 0, x, in_dim, out_dim))
        elif step > 0:
            own = np.arange(n, dtype=np.int64)
            link = DimLink(0, in_dim, (start + step * own, own))
            factors.append(Factor(f"d{out_dim}", n, (link,), (DimLink(0, out_dim),)))
    return OpRule(tuple(factors), ((0,),))


def split(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """x [...] -> consecutive pieces of x along `dim` (split, chunk)."""
    x, dim = inputs[0], attrs["dim"]
    factors = []
    for d in range(len(x)):
        if d != dim:
            links = tuple(DimLink(j, d) for j in range(len(outputs)))
            factors.append(Factor(f"d{d}", x[d], (DimLink(0, d),), links))
            continue
        outs, start = [], 0
        for j, shape in enumerate(outputs):
            own = np.arange(shape[d], dtype=np.int64)
            outs.append(DimLink(j, d, (own, own + start)))
            start += shape[d]
        factors.append(Factor("split", x[d], (DimLink(0, d),), tuple(outs)))
    return OpRule(tuple(factors), ((0,),))


def cat(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """Inputs [...] -> one tensor, the inputs one after the other along `dim`."""
    out, dim = outputs[0], attrs["dim"]
    factors = []
    for d in range(len(out)):
        if d != dim:
            links = tuple(DimLink(i, d) for i in range(len(inputs)))
            factors.append(Factor(f"d{d}", out[d], links, (DimLink(0, d),)))
            continue
        ins, start = [], 0
        for i, shape in enumerate(inputs):
            own = np.arange(shape[d], dtype=np.int64)
            ins.append(DimLink(i, d, (own, own + start)))
            start += shape[d]
        factors.append(Factor("cat", out[d], tuple(ins), (DimLink(0, d),)))
    return OpRule(tuple(factors), (tuple(range(len(inputs))),))


def unbind(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """x [...] -> x's slices along `dim`, without that dim, which is never cut."""
    x, dim = inputs[0], attrs["dim"]
    factors = []
    for d in range(len(x)):
        if d != dim:
            links = tuple(DimLink(j, d - (d > dim)) for j in range(len(outputs)))
            factors.append(Factor(f"d{d}", x[d], (DimLink(0, d),), links))
    return OpRule(tuple(factors), ((0,),))


def stack(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """Inputs [...] of one shape -> one tensor with a new dim `dim`, which is never cut."""
    x, dim = inputs[0], attrs["dim"]
    factors = []
    for d in range(len(x)):
        links = tuple(DimLink(i, d) for i in range(len(inputs)))
        factors.append(Factor(f"d{d}", x[d], links, (DimLink(0, d + (d >= dim)),)))
    return OpRule(tuple(factors), (tuple(range(len(inputs))),))


def repeat_interleave(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """x [...] -> x with each element of `dim` several times in a row, as KV heads are repeated for query heads."""
    x, out, dim = inputs[0], outputs[0], attrs["dim"]
    factors = []
    for d in range(len(x)):
        if d != dim:
            factors.append(passing(0, 0, x, d, d))
            continue
        link = DimLink(0, d, repeat_pairs(x[d], out[d]), cover=True)
        factors.append(Factor("repeat", out[d], (link,), (DimLink(0, d),)))
    return OpRule(tuple(factors), ((0,),))


RULES: dict[str, RuleFunction] = {
    "permute": permute,
    "expand": expand,
    "view": view,
    "slice": slice_,
    "split": split,
    "cat": cat,
    "unbind": unbind,
    "stack": stack,
    "repeat_interleave": repeat_interleave,
}
