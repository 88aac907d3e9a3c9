"""Size symbols, the names of dynamic lengths, evaluated at given sizes.

    "B", "S", "T"   a length of the inputs          "B*S", "B*16"   a product of lengths and numbers
    "?5|8"          a length that follows the inputs or values in an unknown way: 5 and 8 at two example sizes
    "?5~B*S/4"      such a length, 5 at the first example sizes, of which a quarter of B*S is expected
"""

from __future__ import annotations

from collections.abc import Mapping


def expected_length(symbol: str, example: int, sizes: Mapping[str, int]) -> float:
    """Returns the expected length of a dim as `length` does, but unrounded and also below 1: "?7~B*S/4" of one token
    is 0.25."""
    _, depends, expected = symbol.partition("~")
    if not depends:
        return length(symbol, example, sizes)
    whole, _, share = expected.rpartition("/")
    return length(whole, example, sizes) / int(share)


def length(symbol: str, example: int, sizes: Mapping[str, int]) -> int:
    """Returns the length of a dim with this size symbol, by the lengths in `sizes`; `example` where these lack a part.

    A length that depends on values is what is expected of it, rounded, and at least 1.
    """
    if "~" in symbol:
        return max(1, round(expected_length(symbol, example, sizes)))
    product = 1
    for factor in symbol.split("*"):
        if factor not in sizes and not factor.isdecimal():
            return example
        product *= sizes[factor] if factor in sizes else int(factor)
    return product
