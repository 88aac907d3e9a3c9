"""Rules of random ops, whose numbers follow from places in the whole tensor: any dim may be cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cost_model.rules.rule import OpRule, RuleFunction, Shape, broadcast_factors


def dropout(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """x [...], random state [3] -> [...]; every dim of x may be cut, and x is no sum that is owed."""
    return OpRule(broadcast_factors(inputs[:1], outputs[0]))


RULES: dict[str, RuleFunction] = {"dropout": dropout}
