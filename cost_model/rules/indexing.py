"""Rules of ops that pick elements by integers known only when they run: x[index], index_add, gather, scatter.

The dim that the integers pick from is never cut; every other dim goes through. All are linear in what they move: where
each rank has the rows of its own experts, the sum over ranks that is owed (P) passes through them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cost_model.rules.rule import DimLink, Factor, OpRule, RuleFunction, Shape


def index(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """x [...], index tensors -> x[i, :, j]; `dims` lists (input dim, output dim) of the dims that are taken whole."""
    factors = [
        Factor(f"d{b}", inputs[0][a], (DimLink(0, a),), (DimLink(0, b),)) for a, b in attrs["dims"]
    ]
    return OpRule(tuple(factors), ((0,),))


def index_add(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """x [...], index [n], source (x's shape, but n along `dim`) -> x with its slices added, or put, at the index."""
    x = inputs[0]
    factors = [
        Factor(f"d{d}", n, (DimLink(0, d), DimLink(2, d)), (DimLink(0, d),))
        for d, n in enumerate(x)
        if d != attrs["dim"]
    ]
    return OpRule(tuple(factors), ((0, 2),))


def gather(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """x [...], index [...] -> x's elements at `index` along `dim`; a dim that is shorter in the index is not cut."""
    x, at = inputs[0], inputs[1]
    factors = [
        Factor(f"d{d}", n, (DimLink(0, d), DimLink(1, d)), (DimLink(0, d),))
        for d, n in enumerate(x)
        if d != attrs["dim"] and at[d] == n
    ]
    return OpRule(tuple(factors), ((0,),))


def scatter(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """x [...], index [...], source [...] or a number -> x with the source written to, or added at, `index` along `dim`.

    With attr `adds` the source is added. The op is linear in x and source together, provided that an overwriting one
    has each index at most once.
    """
    x = inputs[0]
    factors = []
    for d, n in enumerate(x):
        if d != attrs["dim"] and all(shape[d] == n for shape in inputs):
            links = tuple(DimLink(slot, d) for slot in range(len(inputs)))
            factors.append(Factor(f"d{d}", n, links, (DimLink(0, d),)))
    return OpRule(tuple(factors), ((0, 2),) if len(inputs) == 3 else ())


def split_rows(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """x [rows, ...], counts [pieces] -> the pieces, [counts[j], ...]; rows are never cut."""
    factors = [
        Factor(f"d{d}", n, (DimLink(0, d),), tuple(DimLink(j, d) for j in range(len(outputs))))
        for d, n in enumerate(inputs[0])
        if d > 0
    ]
    return OpRule(tuple(factors), ((0,),))


def join_rows(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """Pieces [counts[j], ...], counts [pieces] -> all rows [rows, ...]; rows are never cut."""
    pieces = range(len(inputs) - 1)
    factors = [
        Factor(f"d{d}", n, tuple(DimLink(i, d) for i in pieces), (DimLink(0, d),))
        for d, n in enumerate(outputs[0])
        if d > 0
    ]
    return OpRule(tuple(factors), (tuple(pieces),))


RULES: dict[str, RuleFunction] = {
    "index": index,
    "index_add": index_add,
    "index_put": index_add,
    "gather": gather,
    "scatter": scatter,
    "split_rows": split_rows,
    "join_rows": join_rows,
}
