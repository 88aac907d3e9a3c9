"""Rules of losses over classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cost_model.rules.rule import DimLink, Factor, OpRule, RuleFunction, Shape

CLASSES = "classes"
# Kind -> the factor whose parts no rank can compute by itself: along it, the ranks first tell each other a number for
# each element of input 0 that is left without the cut dim (the log of the sum over their classes' exps).
EXCHANGED: dict[str, str] = {"cross_entropy": CLASSES}


def cross_entropy(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """scores [n, classes, ...], classes' numbers [n, ...] -> losses [n, ...]; [] with `reduction` "sum" or "mean".

    A loss is a sum over classes, each times its share of the target, of what its score lacks to the log of the sum of
    all scores' exps, which ranks tell each other (EXCHANGED). Rows fall apart but for a mean, whose divisor is of all.
    """
    x, reduction = inputs[0], attrs["reduction"]
    factors = [Factor(CLASSES, x[1], (DimLink(0, 1),), (), reduces=True)]
    for dim in () if reduction == "mean" else (0, *range(2, len(x))):
        row = max(0, dim - 1)  # the same dim of a tensor without classes
        kept = (DimLink(0, row),) if reduction == "none" else ()
        factors.append(Factor(f"d{dim}", x[dim], (DimLink(0, dim), DimLink(1, row)), kept, reduces=not kept))
    return OpRule(tuple(factors))


RULES: dict[str, RuleFunction] = {"cross_entropy": cross_entropy}
