"""symbols."""

from __future__ import annotations

from collections.abc import Mapping


def expected_length(symbol: str, example: int, sizes: Mapping[str, int]) -> float:
    """As `length`, but not rounded, and also below 1: "?7~B*S/4" of one token is 0.25."""
    _, depends, expected = symbol.partition("~")
    if not depends:
        return length(symbol, example, sizes)
    whole, _, share = expected.rpartition("/")
    return length(whole, example, sizes) / int(share)


def length(symbol: str, example: int, sizes: Mapping[str, int]) -> int:
    """What a dim called `symbol` ("B", "B*S", "B*16") is at these sizes; `example`, where a part of it is unknown.

    "?7~B*S/4" depends on values, and a quarter of B*S is expected: at least 1.
    """
    if "~" in symbol:
        return max(1, round(expected_length(symbol, example, sizes)))
    product = 1
    for factor in symbol.split("*"):
        if factor not in sizes and not factor.isdecimal():
            return example
        product *= sizes[factor] if factor in sizes else int(factor)
    return product
