"""`Drawing`: an SVG image that shows itself in a notebook and is saved as a file; and the shapes that it is made of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from xml.etree.ElementTree import Element, tostring

from autodist_fx.errors import AutodistError
from cost_model.explain.html import element

WIDTH = 760.0  # pixels of a drawing
PAD = 18.0  # between its border and what is drawn
LINE = 19.0  # height of a line of text
CHARACTER = 7.3  # width of a character of code, at most
# Characters that XML has not, and a plan's names may have.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
INK = "#141925"  # on the colours of ranks, in light and dark

_TEXT = """
svg.adx text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: var(--ink); }
svg.adx .soft { fill: var(--soft); font-size: 12px; }
svg.adx .strong { font-weight: 600; }
svg.adx .code { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
svg.adx .onto { font-size: 11px; }
"""


@dataclass(frozen=True, slots=True)
class Drawing:
    """An SVG image: `title` says in words what it shows, `svg` is its text, light and dark as its reader prefers."""

    title: str
    svg: str

    def _repr_svg_(self) -> str:
        """Returns the image, for notebooks."""
        return self.svg

    def __str__(self) -> str:
        return f"[drawing: {self.title}]"

    def save(self, path: str | Path) -> None:
        """Write the image to a file. Raises AutodistError where that cannot be written."""
        try:
            Path(path).write_text(self.svg + "\n", encoding="utf-8")
        except OSError as error:
            raise AutodistError(f"cannot write {path}: {error.strerror or error}") from error


def drawing(title: str, height: float, shapes: Sequence[Element | None], width: float = WIDTH) -> Drawing:
    """Make an image of `shapes`, which were placed from (PAD, PAD) on; `height` is that of all of them."""
    size = f"0 0 {width:g} {height + 2 * PAD:g}"
    root = element(
        "svg",
        element("title", title),
        element("style", _style()),
        box(0.5, 0.5, width - 1, height + 2 * PAD - 1, fill="var(--card)", stroke="var(--line)", round_by=10),
        *shapes,
        cls="adx",
        xmlns="http://www.w3.org/2000/svg",
        viewBox=size,
        width=f"{width:g}",
        height=f"{height + 2 * PAD:g}",
        role="img",
    )
    return Drawing(title, _NOT_XML.sub("\ufffd", tostring(root, encoding="unicode")))


def box(
    x: float, y: float, width: float, height: float, *, fill: str | None = None, stroke: str | None = None,
    round_by: float = 4, cls: str | None = None, title: str | None = None, opacity: float | None = None,
) -> Element:  # fmt: skip
    """Build a rectangle."""
    return element(
        "rect",
        element("title", title) if title else None,
        x=f"{x:.2f}",
        y=f"{y:.2f}",
        width=f"{max(width, 0):.2f}",
        height=f"{height:.2f}",
        rx=f"{min(round_by, width / 2, height / 2):g}",
        fill=fill,
        stroke=stroke,
        fill_opacity=None if opacity is None else f"{opacity:g}",
        cls=cls,
    )


def words(x: float, y: float, text: str, cls: str | None = None, *, anchor: str = "start", fill: str = "") -> Element:
    """Build a line of text whose baseline is at y. `anchor`: start, middle or end is at x."""
    style = f"fill:{fill}" if fill else None
    return element("text", text, x=f"{x:.2f}", y=f"{y:.2f}", text_anchor=anchor, cls=cls, style=style)


def arrow(x: float, y: float, length: float) -> Element:
    """Build an arrow to the right."""
    path = f"M{x:.1f} {y:.1f}h{length - 7:.1f}M{x + length:.1f} {y:.1f}l-9 -5v10z"
    return element("path", d=path, stroke="var(--comm)", stroke_width="2", fill="var(--comm)")


def legend(x: float, y: float, entries: Sequence[tuple[str, str]], *, by_class: bool = False) -> list[Element]:
    """Build a row of coloured squares with names; entries are (colour, name), or with `by_class` (class, name)."""
    found: list[Element] = []
    for colour, name in entries:
        fill, cls = (None, colour) if by_class else (colour, None)
        found += [box(x, y - 10, 12, 12, round_by=3, fill=fill, cls=cls), words(x + 18, y, name, "soft")]
        x += 18 + 6.6 * len(name) + 20
    return found


@cache
def _style() -> str:
    """Return the colours of the plan's page, for an image: the beginning of page.css."""
    css = files("autodist_fx.report").joinpath("page.css").read_text(encoding="utf-8")
    colours, found, _ = css.partition("\n* { box-sizing")
    assert found, "page.css begins with its colours"
    colours = re.sub(r"/\*.*?\*/", "", colours, flags=re.DOTALL).replace(":root", "svg.adx")
    return re.sub(r"(?m)(^|\} )\.r(\d)", r"\1svg.adx .r\2", colours) + _TEXT


__all__ = ["CHARACTER", "Drawing", "INK", "LINE", "PAD", "WIDTH", "arrow", "box", "drawing", "legend", "words"]
