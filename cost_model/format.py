"""Formats figures and names for people: bytes, seconds, counts, and the names of alike layers as one."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")


def name_pattern(name: str) -> str:
    """Replaces the numbers in a module path by stars: "model.layers.3.mlp" -> "model.layers.*.mlp"."""
    return _NUMBER.sub("*", name)


def layer_of(module: str) -> str:
    """Returns the repeated layer that a module is of, its path up to the first number; "" for one that is of none.

    "model.layers.3.mlp" -> "model.layers.3"
    """
    found = _NUMBER.search(module)
    return module[: found.end()] if found else ""


def compress_names(names: Iterable[str]) -> list[str]:
    """Joins names that differ in one number only: h.0, h.1, h.3 -> ["h.0-1,3"], in the order of first appearance."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for name in names:
        found = list(_NUMBER.finditer(name))
        if not found:
            groups.setdefault((name,), [])
            continue
        # The first number counts layers; names that differ behind it are not alike.
        at = found[0]
        groups.setdefault((name[: at.start()], name[at.end() :]), []).append(int(at.group()))
    return [key[0] if len(key) == 1 else f"{key[0]}{ranges_text(numbers)}{key[1]}" for key, numbers in groups.items()]


def ranges_text(numbers: Iterable[int]) -> str:
    """Formats integers as sorted ranges: 0, 1, 2, 5 -> "0-2,5"."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def ops_text(count: int) -> str:
    """Formats a number of ops: "1 op", "2 ops"."""
    return "1 op" if count == 1 else f"{count} ops"


def bytes_text(nbytes: float) -> str:
    """Formats bytes in binary units, with at most three digits: 1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if nbytes < 1000 or unit == "EiB":  # 1000, so that no number has four digits
            break
        nbytes /= 1024
    return f"{nbytes:.0f} {unit}" if unit == "B" or nbytes >= 100 else f"{nbytes:.1f} {unit}"


def seconds_text(seconds: float) -> str:
    """Formats seconds in s, ms or us, with three digits: 0.0123 -> "12.3 ms"."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1 or unit == "us":
            break
    value = seconds * scale
    if value >= 1e5:
        return f"{value:.3g} {unit}"
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def count_text(count: float) -> str:
    """Formats a count in powers of 1000: 12.3e9 -> "12.3 G"."""
    for unit in ("", " k", " M", " G", " T", " P"):
        if count < 1000 or unit == " P":
            break
        count /= 1000
    return f"{count:.0f}{unit}" if 100 <= count < 1e5 or not unit else f"{count:.3g}{unit}"
