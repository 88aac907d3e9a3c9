"""Formats sections of tables and lines as plain text of at most WIDTH columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDTH = 120


@dataclass(frozen=True, slots=True)
class Section:
    """A titled part of a report on a plan: a table whose first row is its header, lines under it, or both.

    Columns in `left` are aligned left, the others right; `flexible` is the column that may be broken to fit.
    """

    title: str
    rows: tuple[tuple[str, ...], ...] = ()
    lines: tuple[str, ...] = ()
    left: tuple[int, ...] = ()
    flexible: int | None = None
    indent: str = ""  # in front of a line's continuation


def sections_text(header: Sequence[str], sections: Iterable[Section]) -> str:
    """Joins the lines of `header` and the sections, a blank line between them, in lines of at most WIDTH."""
    blocks = [header, *map(_section_lines, sections)]
    # Tables fit by themselves unless a name in a plan is absurd; then its line is cut rather than the page broken.
    return "\n\n".join("\n".join(part for line in lines for part in _fitted(line)) for lines in blocks)


def table(rows: Sequence[Sequence[str]], left: Sequence[int] = (), flexible: int | None = None) -> list[str]:
    """Formats a table into lines. Its first row is the header; columns in `left` are aligned left, the others right.

    Where the table would be wider than WIDTH, the column `flexible` is broken over several lines.
    """
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    gap = 2
    if flexible is not None:
        room = WIDTH - sum(widths) - gap * (len(widths) - 1) + widths[flexible]
        widths[flexible] = max(min(widths[flexible], room), 16)
    lines = []
    for number, row in enumerate(rows):
        pieces = _broken(row[flexible], widths[flexible]) if flexible is not None else [""]
        for k, piece in enumerate(pieces):
            cells = [piece if c == flexible else cell if k == 0 else "" for c, cell in enumerate(row)]
            padded = [cell.ljust(w) if c in left else cell.rjust(w) for c, (cell, w) in enumerate(zip(cells, widths))]
            lines.append((" " * gap).join(padded).rstrip())
        if number == 0:
            lines.append((" " * gap).join("-" * w for w in widths))
    return lines


def _broken(text: str, width: int) -> list[str]:
    """Breaks `text` into pieces of at most `width`, behind a comma, a dot or a blank where there is one."""
    pieces = []
    while len(text) > width:
        at = max(text.rfind(", ", 0, width) + 1, text.rfind(",", 0, width) + 1)
        if at <= 0:
            at = max(text.rfind(".", 0, width) + 1, text.rfind(" ", 0, width) + 1)
        at = at if at > 0 else width
        pieces.append(text[:at].rstrip())
        text = text[at:].lstrip()
    return [*pieces, text]


def _fitted(line: str) -> list[str]:
    return [line] if len(line) <= WIDTH else _wrapped(line, indent="  ")


def _wrapped(text: str, indent: str) -> list[str]:
    first, *rest = _broken_words(text, WIDTH, len(indent))
    return [first, *(indent + line for line in rest)]


def _broken_words(text: str, width: int, indent: int) -> list[str]:
    """Breaks `text` into lines of whole words (a longer word is cut), all but the first `indent` shorter."""
    lines = [""]
    for word in text.split(" "):
        room = width - (indent if len(lines) > 1 else 0)
        if lines[-1] and len(lines[-1]) + 1 + len(word) > room:
            lines.append("")
            room = width - indent
        while len(word) > room:
            lines[-1] += word[: room - len(lines[-1])]
            word = word[room:]
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}" if lines[-1] else word
    return lines


def _section_lines(section: Section) -> list[str]:
    lines = [line for text in section.lines for line in _wrapped(text, section.indent)]
    rows = table(section.rows, section.left, section.flexible) if section.rows else []
    return [section.title, *rows, *lines]
