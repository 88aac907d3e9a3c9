"""Rules of products: linear, matmul, attention, embedding; and of the KV cache that attention reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cost_model.rules.rule import DimLink, Factor, OpRule, RuleFunction, Shape, passing, repeat_pairs


def linear(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """x [..., i], weight [o, i] (or [i, o] with attr `transposed`), bias [o]? -> [..., o]."""
    x, weight = inputs[0], inputs[1]
    o_dim, i_dim = (1, 0) if attrs.get("transposed") else (0, 1)
    last = len(x) - 1
    factors = [passing(0, 0, x, d, d) for d in range(last)]
    bias = (DimLink(2, 0),) if len(inputs) > 2 else ()
    factors.append(Factor("column", weight[o_dim], (DimLink(1, o_dim), *bias), (DimLink(0, last),)))
    factors.append(Factor("row", weight[i_dim], (DimLink(0, last), DimLink(1, i_dim)), (), reduces=True))
    return OpRule(tuple(factors))


def matmul(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """a [..., m, k], b [..., k, n] -> [..., m, n], batch dims broadcast; no factor for vectors."""
    a, b, out = inputs[0], inputs[1], outputs[0]
    if len(a) < 2 or len(b) < 2:
        return OpRule()
    factors = []
    for dim in range(len(out) - 2):
        links = []
        for slot, shape in ((0, a), (1, b)):
            own = dim - (len(out) - len(shape))
            if own >= 0 and shape[own] == out[dim]:
                links.append(DimLink(slot, own))
        factors.append(Factor(f"d{dim}", out[dim], tuple(links), (DimLink(0, dim),)))
    factors.append(Factor("m", a[-2], (DimLink(0, len(a) - 2),), (DimLink(0, len(out) - 2),)))
    factors.append(Factor("n", b[-1], (DimLink(1, len(b) - 1),), (DimLink(0, len(out) - 1),)))
    factors.append(Factor("k", a[-1], (DimLink(0, len(a) - 1), DimLink(1, len(b) - 2)), (), reduces=True))
    return OpRule(tuple(factors))


def sdpa(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """q [b,h,s,d], k [b,g,t,d], v [b,g,t,e], mask broadcast to [b,h,s,t]? -> [b,h,s,e]; only heads are cut.

    With g < h KV heads (grouped attention) each goes with h/g query heads in a row.
    """
    q = inputs[0]
    head = len(q) - 3
    if head < 0:
        return OpRule()
    links = [DimLink(0, head)]
    for slot in (1, 2):
        groups = inputs[slot][head]
        if groups == q[head]:
            links.append(DimLink(slot, head))
        else:
            links.append(DimLink(slot, head, repeat_pairs(groups, q[head]), cover=True))
    if len(inputs) > 3 and len(inputs[3]) >= 3 and inputs[3][-3] == q[head]:
        links.append(DimLink(3, len(inputs[3]) - 3))
    factors = [Factor("heads", q[head], tuple(links), (DimLink(0, head),))]
    return OpRule(tuple(factors))


def experts(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """x [n, h], chosen experts [n, k], their weights [n, k], up [e, 2 i, h] (gate and up, as attr `parts` says; [e, i,
    h] for "one"), down [e, h, i] (the last two dims of both the other way round if `transposed`), biases [e, 2 i] and
    [e, h]? -> [n, h]: a sum over experts and over the inside of each. Cut inside, one rank alone adds down's bias."""
    x, up, down = inputs[0], inputs[3], inputs[4]
    up_dim, down_dim = (2, 1) if attrs["transposed"] else (1, 2)
    inner = down[down_dim]
    both = np.arange(up[up_dim], dtype=np.int64)
    inside = {"one": None, "halves": (both, both % max(1, inner)), "pairs": (both, both // 2)}[attrs["parts"]]
    own = [DimLink(slot, 0) for slot in range(3, len(inputs))]
    inner_links = [DimLink(3, up_dim, inside), DimLink(4, down_dim)]
    if len(inputs) > 5:
        inner_links.append(DimLink(5, 1, inside))
    return OpRule((
        Factor("d0", x[0], tuple(DimLink(slot, 0) for slot in (0, 1, 2)), (DimLink(0, 0),)),
        Factor("experts", up[0], tuple(own), (), reduces=True),
        Factor("inner", inner, tuple(inner_links), (), reduces=True),
    ))  # fmt: skip


def embedding(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """ids [...], table [v, d] -> [..., d]."""
    table, last = inputs[1], len(outputs[0]) - 1
    return OpRule((
        Factor("vocab", table[0], (DimLink(1, 0),), (), reduces=True),
        Factor("hidden", table[1], (DimLink(1, 1),), (DimLink(0, last),)),
    ))  # fmt: skip


def cache_update(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """k [b,g,s,d], v [b,g,s,e] -> all keys [b,g,t,d], all values [b,g,t,e]; heads stay where they are."""
    k, v = inputs[0], inputs[1]
    if len(k) != 4 or len(v) != 4 or k[1] != v[1]:
        return OpRule()
    return OpRule((Factor("heads", k[1], (DimLink(0, 1), DimLink(1, 1)), (DimLink(0, 1), DimLink(1, 1))),))


def cache_read(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """No inputs -> keys [b,g,t,d], values [b,g,t,e], as an update has left them in the cache."""
    k, v = outputs
    if len(k) != 4 or len(v) != 4 or k[1] != v[1]:
        return OpRule()
    return OpRule((Factor("heads", k[1], (), (DimLink(0, 1), DimLink(1, 1))),))


RULES: dict[str, RuleFunction] = {
    "linear": linear,
    "matmul": matmul,
    "experts": experts,
    "sdpa": sdpa,
    "embedding": embedding,
    "cache_update": cache_update,
    "cache_read": cache_read,
}
