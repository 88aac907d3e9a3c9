"""Prints a plan in the terminal: the sections of the plain text as rich tables, with coloured roles and with bars."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from autodist_fx.report.memory import memory_rows, share_of_device
from autodist_fx.report.profile import Profile, profile_header, profile_sections
from cost_model.explain.plan_text import plan_header, plan_sections
from cost_model.format import bytes_text, ranges_text, seconds_text
from cost_model.partition_plan import PartitionPlan
from cost_model.text_tables import WIDTH, Section

ROLE_STYLES = {
    "column": "blue", "row": "yellow", "vocab": "green", "hidden": "cyan", "groups": "magenta", "expert": "magenta",
    "replicate": "red",
}  # fmt: skip
BAR_WIDTH = 44


def print_plan(plan: PartitionPlan, console: Console | None = None) -> None:
    """Print a plan, to standard output by default; without colours
    and as wide as the plain text where that is no terminal."""
    console = _begun(plan_header(plan), console)
    for section in plan_sections(plan):
        _print_section(console, section)
        if section.title.startswith("Stages"):
            console.print(Text("\nTimeline of one forward", style="bold"), _timeline(plan), sep="\n")
            console.print(Text("\nMemory of each rank", style="bold"), _memory(plan), sep="\n")


def print_profile(profile: Profile, console: Console | None = None) -> None:
    """Print what was measured of a split, as `print_plan` prints a plan."""
    console = _begun(profile_header(profile), console)
    for section in profile_sections(profile):
        _print_section(console, section)


def _begun(header: Sequence[str], console: Console | None) -> Console:
    """Print a header; return the console, as wide as the plain text where it is no terminal."""
    console = console or Console()
    if not console.is_terminal:
        console.width = WIDTH
    first, *more = header
    console.print(Text(first, style="bold"), *map(Text, more), sep="\n")
    return console


def _print_section(console: Console, section: Section) -> None:
    console.print(Text("\n" + section.title, style="bold"))
    console.print(_section(section))


def _section(section: Section) -> RenderableType:
    """Render one section of the plan's text: a table and lines."""
    parts: list[RenderableType] = []
    if section.rows:
        header, *rows = section.rows
        table = _table()
        for i, title in enumerate(header):
            side = "left" if i in section.left else "right"
            # Names may be folded; numbers and shapes stay in one piece.
            table.add_column(Text(title), justify=side, overflow="fold", no_wrap=i != section.flexible)  # type: ignore[arg-type]
        role = header.index("role") if "role" in header else -1
        for row in rows:
            # Text objects, so that rich reads no name of a plan as markup.
            table.add_row(*(Text(c, ROLE_STYLES.get(c, "") if i == role else "") for i, c in enumerate(row)))
        parts.append(table)
    style = "yellow" if section.title == "Warnings" else ""
    parts += [Text(line, style) for line in section.lines]
    return Group(*parts)


def _timeline(plan: PartitionPlan) -> Table:
    """Render the stages of one forward as bars over seconds."""
    end = max(plan.predicted_seconds, plan.one_device_seconds if plan.mesh.size > 1 else 0.0)
    table, at = _table("", "", "from", "to"), 0.0
    for s in plan.stages:
        bar = Bar(end or 1.0, at, at + s.seconds, width=BAR_WIDTH, color="blue")
        table.add_row(f"stage {s.index}", bar, seconds_text(at) if at else "0", seconds_text(at + s.seconds))
        at += s.seconds
    if plan.mesh.size > 1 and plan.one_device_seconds:
        bar = Bar(end, 0.0, plan.one_device_seconds, width=BAR_WIDTH, color="bright_black")
        table.add_row("one device", bar, "0", seconds_text(plan.one_device_seconds))
    return table


def _memory(plan: PartitionPlan) -> Table:
    """Render each rank's memory as a bar."""
    rows = memory_rows(plan)
    most = max((sum(n for _, n in parts) for _, _, parts in rows), default=0)
    table = _table("", "", "in all", "of its device")
    for stage, ranks, parts in rows:
        total = sum(n for _, n in parts)
        label = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranges_text(ranks)}, each"
        bar = Bar(most or 1, 0, total, width=BAR_WIDTH, color="green")
        table.add_row(label, bar, bytes_text(total), share_of_device(plan, stage, total))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for i, title in enumerate(columns):
        table.add_column(title, justify="right" if i > 1 else "left", no_wrap=True)
    return table
