"""Draws to scale how a weight is cut over tp ranks: a bar of the dim that is cut, and the whole matrix in small."""

from __future__ import annotations

from itertools import accumulate, pairwise
from xml.etree.ElementTree import Element

from autodist_fx.report.html_parts import span
from autodist_fx.report.overview import colour
from cost_model.explain.html import element
from cost_model.graph.placement import Layout

PIECES_DRAWN = 6_000  # on a page; once they are used up, further bars are left out, and the text beside them remains
PIECES_OF_A_BAR = 600
CELLS = 200  # resolution of a dim that has more pieces than that
# Digits of a rank's number -> the fraction of a bar that is wide enough to show it (a bar is 220 px or more).
ROOM = {1: 0.045, 2: 0.075, 3: 0.1}
LANES_WITH_NUMBERS = 8


class SplitBars:
    """The bars of one page. Weights that share a layout share a drawing."""

    def __init__(self, layouts: tuple[Layout, ...], tp: int) -> None:
        self.layouts = layouts
        self.tp = tp
        self._drawn: dict[int, Element | None] = {}
        self._left = PIECES_DRAWN

    def bar(self, index: int) -> Element | None:
        """Build the bar of a layout by its index (-1: each rank has
        all of it); None where the page has no room left."""
        layout = self.layouts[index] if index >= 0 else None
        if layout is None or layout.is_whole or not layout.size:
            text = "whole on each rank" if self.tp > 1 else "whole"
            return element("div", element("span", text), cls="bar whole")
        if index not in self._drawn:
            self._drawn[index] = self._draw(layout)
        bar = self._drawn[index]
        pieces = sum(len(lane) for lane in bar) if bar is not None else 0
        if bar is None or pieces > self._left:
            return None
        self._left -= pieces
        return bar

    def counts(self, counts: list[int]) -> Element | None:
        """Build the bar of whole weights: `counts` gives how many each tp rank holds, in order of ranks."""
        ends = list(accumulate(counts, initial=0))
        parts = tuple(((a, b),) if b > a else () for a, b in pairwise(ends))
        return self._draw(Layout(ends[-1], parts))

    def _draw(self, layout: Layout) -> Element | None:
        """Draw a layout, coarsely where it has many pieces; None where even that is too much."""
        pieces = [(r, a, b) for r, part in enumerate(layout.parts) for a, b in part]
        if len(pieces) <= PIECES_OF_A_BAR:
            lanes = _lanes(layout)
        else:  # one lane per rank
            lanes = [[(r, *cells) for cells in _coarse(part, layout.size)] for r, part in enumerate(layout.parts)]
            if sum(map(len, lanes)) > PIECES_OF_A_BAR * 8:
                return None
        size = layout.size
        height = "tall" if len(lanes) <= 2 else "low" if len(lanes) <= LANES_WITH_NUMBERS else "thin"
        rows = [element("div", *(_piece(layout, p, len(lanes)) for p in lane), cls="lane") for lane in lanes]
        return element("div", *rows, cls=f"bar {height}", role="img", aria_label=_in_words(layout, size))


MATRIX = 32.0  # pixels of a matrix's longer side
MATRIX_PIECES = 40


def matrix(shape: tuple[int, ...], layout: Layout | None, dim: int) -> Element | None:
    """Draw a 2-D weight as a small rectangle in its proportions,
    cut where `layout` cuts `dim`; None for other shapes."""
    if len(shape) != 2 or not all(shape):
        return None
    rows, columns = shape
    height, width = (max(MATRIX * n / max(shape), 3.0) for n in (rows, columns))
    left, top = (MATRIX - width) / 2 + 1, (MATRIX - height) / 2 + 1
    pieces = sum(map(len, layout.parts)) if layout else 0
    if layout is None or layout.is_whole or pieces > MATRIX_PIECES:
        drawn = [_rectangle(left, top, width, height, "all")]
    else:
        drawn = []
        lanes = _lanes(layout)
        for k, lane in enumerate(lanes):
            for rank, a, b in lane:
                start, share, across = a / layout.size, (b - a) / layout.size, 1 / len(lanes)
                if dim == 0:
                    box = (left + k * across * width, top + start * height, across * width, share * height)
                else:
                    box = (left + start * width, top + k * across * height, share * width, across * height)
                drawn.append(_rectangle(*box, colour(rank)))
    view = f"0 0 {MATRIX + 2:g} {MATRIX + 2:g}"
    return element("svg", *drawn, viewBox=view, cls="matrix", aria_hidden="true")


def _rectangle(x: float, y: float, width: float, height: float, cls: str) -> Element:
    return element("rect", x=f"{x:.2f}", y=f"{y:.2f}", width=f"{width:.2f}", height=f"{height:.2f}", cls=cls)


def _piece(layout: Layout, piece: tuple[int, int, int], lanes: int) -> Element:
    rank, start, stop = piece
    share = (stop - start) / layout.size
    wide = share >= ROOM.get(len(str(rank)), 1.0) and lanes <= LANES_WITH_NUMBERS
    return element(
        "i",
        str(rank) if wide else None,
        cls=colour(rank),
        style=span(start / layout.size, share),
        title=f"tp rank {rank}: {start}–{stop - 1}",
    )


def _lanes(layout: Layout) -> list[list[tuple[int, int, int]]]:
    """Sort (rank, start, stop) pieces into as few lanes as keep overlapping pieces apart; a rank stays in one lane."""
    lanes: list[list[tuple[int, int, int]]] = []
    for rank, part in enumerate(layout.parts):
        for lane in lanes:
            if not any(start < b and a < stop for start, stop in part for _, a, b in lane):
                break
        else:
            lane = []
            lanes.append(lane)
        lane.extend((rank, a, b) for a, b in part)
    return lanes


def _coarse(part: tuple[tuple[int, int], ...], size: int) -> list[tuple[int, int]]:
    """Round a rank's intervals outward to CELLS cells per dim, and return them as intervals of elements."""
    runs: list[list[int]] = []
    for start, stop in part:
        first, last = start * CELLS // size, -(-stop * CELLS // size)
        if runs and first <= runs[-1][1]:
            runs[-1][1] = max(last, runs[-1][1])
        else:
            runs.append([first, last])
    return [(a * size // CELLS, min(-(-b * size // CELLS), size)) for a, b in runs]


def _in_words(layout: Layout, size: int) -> str:
    """Describe for screen readers how many elements each tp rank holds."""
    held = [layout.local_size(r) for r in range(len(layout.parts))]
    shared = ", some held by several ranks" if layout.overlaps else ""
    if len(set(held)) == 1:
        return f"{size} elements, {held[0]} on each of {len(held)} tp ranks{shared}"
    named = ", ".join(f"{n} on tp rank {r}" for r, n in enumerate(held[:16]))
    return f"{size} elements: {named}{', ...' if len(held) > 16 else ''}{shared}"
