"""Draws figures as bars: one a row, each of one part or of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from xml.etree.ElementTree import Element

from autodist_fx.report.svg.drawing import PAD, WIDTH, Drawing, box, drawing, legend, words

BAR, GAP = 22.0, 8.0
COLOURS = ("var(--weights)", "var(--kv)", "var(--activations)", "var(--workspace)", "var(--alone)")
NAME, SAID = 130.0, 112.0  # pixels of a row's name on the left, and of its sum on the right


def draw_bars(
    title: str, rows: Sequence[tuple[str, Mapping[str, float]]], said: Callable[[float], str], *, limit: float = 0.0
) -> Drawing:
    """Draw a bar for each row, (name, {part: value}); `said` formats the sum of a row.

    limit: a line across all bars, the room that there is, say; 0.0: none.
    """
    parts = list(dict.fromkeys(part for _, values in rows for part in values))
    colours = dict(zip(parts, COLOURS, strict=False))
    room = WIDTH - 2 * PAD - NAME - SAID
    largest = max([limit, *(sum(values.values()) for _, values in rows)])
    top = PAD + (24 if len(parts) > 1 else 0)
    shapes: list[Element] = legend(PAD, PAD + 10, [(colours[p], p) for p in parts]) if len(parts) > 1 else []
    for i, (name, values) in enumerate(rows):
        y, x = top + i * (BAR + GAP), PAD + NAME
        shapes += [words(PAD, y + 16, name), box(x, y, room, BAR, fill="var(--track)", round_by=3)]
        for part, value in values.items():
            width = value / largest * room
            shapes.append(box(x, y, width, BAR, fill=colours[part], round_by=0, title=f"{part}: {said(value)}"))
            x += width
        shapes.append(words(WIDTH - PAD, y + 16, said(sum(values.values())), "soft", anchor="end"))
    height = len(rows) * (BAR + GAP) - GAP
    if limit:
        x = PAD + NAME + limit / largest * room
        shapes.append(box(x - 1, top - 4, 2, height + 8, fill="var(--ink)", round_by=0, title=f"limit: {said(limit)}"))
    return drawing(title, top - PAD + height, shapes)


__all__ = ["draw_bars"]
