"""Writes a plan's sections as HTML: a compact fragment for notebooks, and the elements that a whole page is built from.

Elements are xml.etree's, which escapes all names of a plan file when they are written out.
"""

from __future__ import annotations

from xml.etree.ElementTree import Element, tostring

from cost_model.explain.plan_text import plan_header, plan_sections
from cost_model.plan.data import PlanData
from cost_model.text_tables import Section

ROWS_SHOWN = 200  # rows of a table
TEXT_SHOWN = 400  # characters of a cell or a line
# Rules for what is inside .adx-plan only, in the colours of the notebook around it.
STYLE = """
.adx-plan{font-size:13px;line-height:1.45;max-width:76rem}
.adx-plan p{margin:.15em 0}
.adx-plan summary{cursor:pointer;font-weight:600;margin-top:.5em}
.adx-plan .adx-scroll{overflow-x:auto}
.adx-plan table{border-collapse:collapse;margin:.35em 0;font-size:inherit;font-variant-numeric:tabular-nums}
.adx-plan th,.adx-plan td{padding:.15em .7em;text-align:right;vertical-align:top;background:none;
white-space:nowrap;border:0;border-bottom:1px solid rgba(128,128,128,.3)}
.adx-plan th{font-weight:600}
.adx-plan .adx-left{text-align:left;white-space:normal;overflow-wrap:break-word;max-width:28em}
"""


def element(tag: str, *children: Element | str | None, **attributes: str | None) -> Element:
    """Builds an element with text and elements in it; None is left out. `cls` is class, `data_v` is data-v."""
    found = Element(tag)
    for key, value in attributes.items():
        if value is not None:
            found.set({"cls": "class"}.get(key, key).replace("_", "-"), value)
    for child in children:
        if isinstance(child, str):
            if len(found):
                found[-1].tail = (found[-1].tail or "") + child
            else:
                found.text = (found.text or "") + child
        elif child is not None:
            # An element's tail, the text behind it, belongs to its place in the parent: a copy without it is added.
            copy = Element(child.tag, child.attrib)
            copy.text = child.text
            copy.extend(child)
            found.append(copy)
    return found


def to_html(root: Element) -> str:
    """Writes an element as HTML."""
    return tostring(root, encoding="unicode", method="html")


def shorten(text: str, most: int = TEXT_SHOWN) -> str:
    """Leaves out the middle of a text longer than `most` characters: names differ mostly at their ends."""
    return text if len(text) <= most else f"{text[: most // 3]}…{text[-(most - most // 3 - 1) :]}"


def section_table(section: Section, **attributes: str | None) -> Element:
    """Returns a table element of the section's rows."""
    header, *rows = section.rows

    def cells(row: tuple[str, ...], tag: str, **more: str) -> Element:
        sides = ["adx-left" if i in section.left else None for i in range(len(row))]
        return element("tr", *(element(tag, shorten(text), cls=side, **more) for text, side in zip(row, sides)))

    return element(
        "table",
        element("thead", cells(header, "th", scope="col")),
        element("tbody", *(cells(row, "td") for row in rows[:ROWS_SHOWN]), _left_out(len(rows), len(header))),
        **attributes,
    )


def _left_out(rows: int, columns: int) -> Element | None:
    if rows <= ROWS_SHOWN:
        return None
    text = f"and {rows - ROWS_SHOWN} more"
    return element("tr", element("td", text, colspan=str(columns), cls="adx-left"))


def plan_fragment(plan: PlanData) -> str:
    """Returns HTML for a notebook cell: stages, prediction and warnings open, the rest to unfold; no script or link."""
    first, *more = plan_header(plan)
    opened = ("Stages", "Prediction", "Warnings")
    root = element(
        "div",
        element("style", STYLE),
        element("p", element("strong", shorten(first))),
        *(element("p", shorten(line)) for line in more),
        *(_folded(section, section.title.startswith(opened)) for section in plan_sections(plan)),
        cls="adx-plan",
    )
    return to_html(root)


def _folded(section: Section, is_open: bool) -> Element:
    return element(
        "details",
        element("summary", section.title),
        element("div", section_table(section), cls="adx-scroll") if section.rows else None,
        *(element("p", shorten(line)) for line in section.lines[:ROWS_SHOWN]),
        open="open" if is_open else None,
    )


__all__ = ["element", "plan_fragment", "section_table", "shorten", "to_html"]
