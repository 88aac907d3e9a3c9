"""Small parts that the sections of the page share: sections, badges, table cells, positions on a bar."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from cost_model.explain.html import element, shorten
from cost_model.format import bytes_text, seconds_text
from cost_model.graph.roles import MEANING

NAME_SHOWN = 80  # characters of a name; longer ones lose their middle
STAGES_SHOWN = 64


def section(key: str, nav: str, title: str, *children: Element | str | None) -> Element:
    """Build a section of the page; `nav` is its name in the page's navigation."""
    return element(
        "section",
        element("h2", title, id=f"{key}-title"),
        *children,
        id=key,
        data_nav=nav,
        aria_labelledby=f"{key}-title",
    )


def note(text: str) -> Element:
    """Build a paragraph of small print."""
    return element("p", text, cls="note")


def show_name(name: str, most: int = NAME_SHOWN) -> str:
    """Shorten a name to `most` characters, by leaving out its middle."""
    return shorten(name, most)


def name(text: str) -> Element:
    """Build a name of the model in a fixed-width font, which may break after its dots and nowhere else."""
    pieces: list[Element | str] = []
    for atom in show_name(text).split("."):
        pieces += [".", element("wbr")] if pieces else []
        is_range = "-" in atom and len(atom) < 16
        pieces.append(element("span", atom, cls="nowrap") if is_range else atom)
    return element("code", *pieces)


def badge(role: str, times: int = 0) -> Element:
    """Build the coloured badge of a role, with "×N" where it stands for N modules."""
    text = show_name(role, 24) + (f" ×{times}" if times else "")
    return element("span", text, cls=f"badge role-{role}" if role in MEANING else "badge", title=MEANING.get(role))


def cell(content: Element | str | None, value: float | str | None = None, cls: str | None = None) -> Element:
    """Build a td; `value` is the key by which its column is sorted, where that is not its text."""
    return element("td", content, data_v=None if value is None else str(value), cls=cls)


def span(start: float, length: float) -> str:
    """Return the CSS of a piece of a bar, from fractions of the bar's width (0.0 to 1.0)."""
    return f"left:{100 * start:.3f}%;width:{100 * length:.3f}%"


def table(header: Sequence[tuple[str, str]], rows: Sequence[Element], label: str, **attributes: str | None) -> Element:
    """Build a table that scrolls sideways where it must. `header` has (title, CSS class) of each column."""
    head = element("tr", *(element("th", title, scope="col", cls=cls or None) for title, cls in header))
    return element(
        "div",
        element("table", element("thead", head), element("tbody", *rows), **attributes),
        cls="scroll",
        tabindex="0",
        role="region",
        aria_label=label,
    )


def left_out(total: int, shown: int, what: str) -> Element | None:
    """Build the note "and N more" for a list that is cut short; None where all is shown."""
    return note(f"and {total - shown} more {what}") if total > shown else None


def seconds_change(seconds: float) -> str:
    """Format a change of seconds with its sign."""
    return f"{'−' if seconds < 0 else '+'}{seconds_text(abs(seconds))}"


def bytes_change(nbytes: int) -> str:
    """Format a change of bytes with its sign."""
    return f"{'−' if nbytes < 0 else '+'}{bytes_text(abs(nbytes))}"


def ranks_text(tp: int, stage: int) -> str:
    """Format the global ranks of one stage."""
    first, last = stage * tp, (stage + 1) * tp - 1
    return f"rank {first}" if first == last else f"ranks {first}–{last}"
