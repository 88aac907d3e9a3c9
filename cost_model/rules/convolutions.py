"""Rules of ops on images: channels are to a convolution what features are to a linear layer.

    conv         [d0 row 9 9], [column row 3 3], [column] -> [d0 column 7 7]  {sum: row; not empty: column row}
    group_norm   [d0 (groups 2) 9 9], [(groups 2)], [(groups 2)] -> [d0 (groups 2) 9 9]  {not empty: groups}
    pool         [d0 d1 9 9] -> [d0 d1 4 4]  {not empty: d0 d1; linear: 0}

A convolution with groups is cut as group_norm is, in whole groups of channels. A pool does each channel for itself:
pooling, padding, resizing. Positions in the image are never cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cost_model.rules.rule import DimLink, Factor, OpRule, RuleFunction, Shape


def _grouped(slot: int, dim: int, size: int, groups: int) -> DimLink:
    """Returns the link of a dim whose `size` elements belong to `groups` groups in order, to the groups."""
    if size == groups:
        return DimLink(slot, dim)
    elements = np.arange(size, dtype=np.int64)
    return DimLink(slot, dim, (elements, elements // (size // groups)))


def conv(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """x [b?, i, ...], weight [o, i/groups, ...] (or [i, o/groups, ...] if `transposed`), bias [o]? -> [b?, o, ...].

    Factors are `filled`, since torch convolves no input without channels.
    """
    x, weight, out, groups = inputs[0], inputs[1], outputs[0], attrs["groups"]
    channel = len(x) - len(weight) + 1
    factors = [Factor("d0", x[0], (DimLink(0, 0),), (DimLink(0, 0),))] if channel else []
    has_bias = len(inputs) > 2
    if groups == 1:
        o_dim, i_dim = (1, 0) if attrs["transposed"] else (0, 1)
        bias = (DimLink(2, 0),) if has_bias else ()
        links = (DimLink(1, o_dim), *bias)
        factors.append(Factor("column", out[channel], links, (DimLink(0, channel),), filled=True))
        links = (DimLink(0, channel), DimLink(1, i_dim))
        factors.append(Factor("row", x[channel], links, (), reduces=True, filled=True))
    else:
        bias = (_grouped(2, 0, out[channel], groups),) if has_bias else ()
        links = (_grouped(0, channel, x[channel], groups), _grouped(1, 0, weight[0], groups), *bias)
        factors.append(Factor("groups", groups, links, (_grouped(0, channel, out[channel], groups),), filled=True))
    return OpRule(tuple(factors))


def batch_norm(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """x [b, c, ...] and any of mean, variance, weight, bias, each [c] -> [b, c, ...].

    Only with given mean and variance (`statistics`) may dims other than c be cut: else these are taken over them.
    """
    x = inputs[0]
    links = (DimLink(0, 1), *(DimLink(i, 0) for i in range(1, len(inputs))))
    factors = [Factor("c", x[1], links, (DimLink(0, 1),), filled=True)]
    if attrs["statistics"]:
        factors += [
            Factor(f"d{d}", x[d], (DimLink(0, d),), (DimLink(0, d),), filled=True) for d in range(len(x)) if d != 1
        ]
    return OpRule(tuple(factors))


def group_norm(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """x [b, c, ...], weight [c]?, bias [c]? -> [b, c, ...]; channels are cut in whole groups."""
    x, groups = inputs[0], attrs["groups"]
    links = (_grouped(0, 1, x[1], groups), *(_grouped(i, 0, x[1], groups) for i in range(1, len(inputs))))
    return OpRule((
        Factor("d0", x[0], (DimLink(0, 0),), (DimLink(0, 0),)),
        Factor("groups", groups, links, (_grouped(0, 1, x[1], groups),), filled=True),
    ))  # fmt: skip


def pool(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """x [..., spatial dims] -> outputs [..., other spatial dims]; all but the last `spatial` dims may be cut."""
    x = inputs[0]
    factors = []
    for d in range(len(x) - attrs["spatial"]):
        links = tuple(DimLink(j, d) for j in range(len(outputs)))
        factors.append(Factor(f"d{d}", x[d], (DimLink(0, d),), links, filled=True))
    return OpRule(tuple(factors), ((0,),) if attrs["linear"] else ())


RULES: dict[str, RuleFunction] = {
    "conv": conv,
    "batch_norm": batch_norm,
    "group_norm": group_norm,
    "pool": pool,
}
