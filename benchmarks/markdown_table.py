"""Tables of markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def escaped(text: str) -> str:
    """So that markdown shows it as it is."""
    return text.replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_").replace("](", "]\\(")


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table whose columns line up in a terminal too."""
    lines = [[str(cell) for cell in line] for line in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * max(width, 1) for width in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)
