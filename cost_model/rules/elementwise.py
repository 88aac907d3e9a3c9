"""Rules of elementwise ops: dims correspond as they broadcast, and every one may be cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cost_model.rules.rule import OpRule, RuleFunction, Shape, broadcast_factors


def elementwise(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """Any number of inputs, broadcast -> one output; not linear, so that inputs must not be Partial."""
    return OpRule(broadcast_factors(inputs, outputs[0]))


def linear_unary(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """x [...] -> [...], linear in x: a Partial x gives a Partial output."""
    return OpRule(broadcast_factors(inputs, outputs[0]), ((0,),))


def mul(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """a * b, broadcast; Partial where either is, and the other whole."""
    # a sum of products with the same factor is the product with the sum
    return OpRule(broadcast_factors(inputs, outputs[0]), ((0,), (1,)) if len(inputs) == 2 else ())


def div(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """a / b, broadcast; Partial where a is, and b whole."""
    return OpRule(broadcast_factors(inputs, outputs[0]), ((0,),) if len(inputs) == 2 else ())


def add(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    """a + b or a - b, broadcast; Partial where both are."""
    # R + P would count R once per rank
    return OpRule(broadcast_factors(inputs, outputs[0]), (tuple(range(len(inputs))),) if len(inputs) == 2 else ())


RULES: dict[str, RuleFunction] = {
    # one input
    "to": elementwise, "abs": elementwise, "exp": elementwise, "log": elementwise, "sqrt": elementwise,
    "rsqrt": elementwise, "reciprocal": elementwise, "cos": elementwise, "sin": elementwise, "tanh": elementwise,
    "sigmoid": elementwise, "silu": elementwise, "gelu": elementwise, "relu": elementwise, "erf": elementwise,
    "softplus": elementwise, "logical_not": elementwise, "clamp": elementwise, "square": elementwise,
    "pow": elementwise, "leaky_relu": elementwise, "elu": elementwise, "mish": elementwise, "hardtanh": elementwise,
    "floor": elementwise, "round": elementwise, "sign": elementwise, "log1p": elementwise,
    "expm1": elementwise, "isnan": elementwise, "isinf": elementwise, "relu6": elementwise, "log_sigmoid": elementwise,
    "hardswish": elementwise, "hardsigmoid": elementwise, "nan_to_num": elementwise, "ceil": elementwise,
    "trunc": elementwise,
    # several inputs
    "maximum": elementwise, "minimum": elementwise, "where": elementwise, "masked_fill": elementwise, "eq": elementwise,
    "ne": elementwise, "lt": elementwise, "le": elementwise, "gt": elementwise, "ge": elementwise, "and": elementwise,
    "or": elementwise, "xor": elementwise, "floordiv": elementwise, "mod": elementwise, "atan2": elementwise,
    "lerp": elementwise, "addcmul": elementwise, "type_as": elementwise,
    # linear in their inputs, each in its way
    "neg": linear_unary, "scale": linear_unary, "identity": linear_unary,
    "mul": mul, "div": div, "add": add, "sub": add,
}  # fmt: skip
