"""Builds one self-contained HTML page from a plan: no network,
no library, light and dark, readable without its script."""

from __future__ import annotations

import hashlib
import sys
from base64 import b64encode
from importlib.resources import files
from pathlib import Path
from xml.etree.ElementTree import Element

from autodist_fx.errors import AutodistError
from autodist_fx.report.html_parts import note, section, show_name
from autodist_fx.report.memory import memory_section
from autodist_fx.report.overview import overview
from autodist_fx.report.profile import Profile, profile_section
from autodist_fx.report.schedule import schedule_section
from autodist_fx.report.stage_transfers import borders_section
from autodist_fx.report.stages import stages_section
from autodist_fx.report.timeline import timeline_section
from autodist_fx.report.weights import weights_section
from cost_model.explain.breakdown import whole_sections
from cost_model.explain.html import element, section_table, shorten, to_html
from cost_model.explain.plan_text import plan_sections
from cost_model.partition_plan import PartitionPlan
from cost_model.schedule.timeline import Timeline
from cost_model.text_tables import Section


def plan_page(plan: PartitionPlan, step: Timeline | None = None, profile: Profile | None = None) -> str:
    """Return the page as text, under 3 MB however large the plan: repeated layers share a row, long lists are cut
    short. `step`: of a training step that was predicted with the plan; `profile`: of the split as it ran."""
    script, style = _file("page.js"), _file("page.css")
    # A plan file may come from anywhere. Its texts are escaped; should that fail, no script but this one runs.
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    sections = [
        stages_section(plan),
        timeline_section(plan),
        None if step is None else schedule_section(step),
        None if profile is None else profile_section(profile),
        memory_section(plan),
        borders_section(plan),
        *weights_section(plan),
        _totals(plan),
    ]
    shown = [part for part in sections if part is not None]
    links = [element("a", part.get("data-nav", ""), href="#" + part.get("id", "")) for part in shown]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", **{"http-equiv": "Content-Security-Policy", "content": policy}),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{show_name(plan.model)} on {plan.mesh}"),
        element("style", style),
    )
    body = element(
        "body",
        element("a", "Skip to the stages", href="#stages", cls="skip"),
        element("header", *overview(plan), cls="top"),
        element("nav", *links, aria_label="Sections"),
        element("main", *shown),
        element("footer", _footer(plan)),
        element("script", script),
    )
    return "<!doctype html>\n" + to_html(element("html", head, body, lang="en")) + "\n"


def write_page(
    path: str, plan: PartitionPlan, step: Timeline | None = None, profile: Profile | None = None
) -> None:
    """Write a plan's page to a file, or to standard output for "-". Raises AutodistError where it cannot be written."""
    write_text(path, plan_page(plan, step, profile))


def write_text(path: str, text: str) -> None:
    """Write a text to a file, or to standard output for "-". Raises AutodistError where it cannot be written."""
    if path == "-":
        print(text, end="")
        return
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise AutodistError(f"cannot write {path}: {error.strerror or error}") from error
    print(f"wrote {path}", file=sys.stderr)


def _file(name: str) -> str:
    return files("autodist_fx.report").joinpath(name).read_text(encoding="utf-8")


def _totals(plan: PartitionPlan) -> Element | None:
    """Build the tables of the dearest ops, bytes moved, collectives and parameters, which the plan's text has, too."""
    parts = [
        part
        for part in (*whole_sections(plan), *plan_sections(plan))
        if part.rows and part.title.startswith(("The dearest", "Bytes moved", "Collectives", "Parameters"))
    ]
    if not parts:
        return None
    tables = [
        element(
            "div",
            element("h3", part.title),
            element("div", section_table(part), cls="scroll", tabindex="0", role="region", aria_label=part.title),
            *(note(show_name(line, 400)) for line in part.lines),
            cls="across" if _is_broad(part) else None,
        )
        for part in sorted(parts, key=lambda part: not _is_broad(part))
    ]
    return section("totals", "Totals", "Where time and bytes go", element("div", *tables, cls="side-by-side"))


def _is_broad(part: Section) -> bool:
    """True if the table has too many columns to stand beside another one."""
    return len(part.rows[0]) > 5


def _footer(plan: PartitionPlan) -> str:
    sizes = ", ".join(f"{symbol}={length}" for symbol, length in plan.sizes)
    return (
        f"Predicted for {show_name(plan.hardware)} at {shorten(sizes) or 'the traced sizes'} (B sequences, S tokens a "
        f"step, P tokens cached before, E tokens that an encoder reads). Plan version {plan.version}, "
        f"graph {plan.fingerprint[:12]}. Made by autodist-fx show."
    )


__all__ = ["plan_page", "write_page", "write_text"]
