"""Rules of norms, reductions and scans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cost_model.rules.rule import DimLink, Factor, OpRule, RuleFunction, Shape, passing


def layer_norm(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """x [...], weight?, bias? -> [...]; the last `normalized` dims are normalised, and never cut."""
    x = inputs[0]
    return OpRule(tuple(passing(0, 0, x, d, d) for d in range(len(x) - int(attrs["normalized"]))))


def along(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """x [...] -> outputs [...] of x's rank, computed along `dims` (softmax, cumsum); every other dim may be cut."""
    x = inputs[0]
    cut = {d % len(x) for d in attrs["dims"]}
    factors = []
    for d in range(len(x)):
        if d not in cut:
            factors.append(Factor(f"d{d}", x[d], (DimLink(0, d),), tuple(DimLink(j, d) for j in range(len(outputs)))))
    return OpRule(tuple(factors), ((0,),) if attrs.get("linear") else ())


def reduce(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """x [...] -> outputs without `dims`, or with 1 there (`keepdim`). A sum or mean over a sharded dim is Partial; for
    other reductions the dims are never cut."""
    x, keep = inputs[0], bool(attrs["keepdim"])
    dims = sorted(d % len(x) for d in attrs["dims"])
    adds_up = attrs["op"] in ("sum", "mean")
    factors = []
    for d in range(len(x)):
        if d in dims:
            if adds_up:
                factors.append(Factor(f"sum{d}", x[d], (DimLink(0, d),), (), reduces=True))
        else:
            out_dim = d if keep else d - sum(1 for c in dims if c < d)
            links = tuple(DimLink(j, out_dim) for j in range(len(outputs)))
            factors.append(Factor(f"d{d}", x[d], (DimLink(0, d),), links))
    return OpRule(tuple(factors), ((0,),) if adds_up else ())


RULES: dict[str, RuleFunction] = {
    "layer_norm": layer_norm,
    "rms_norm": layer_norm,
    "softmax": along,
    "log_softmax": along,
    "cumsum": along,
    "flip": along,
    "roll": along,
    "reduce": reduce,
}
