"""Look at what is installed and what this machine has: versions, devices, transports, measured hardware, caches.

The exit code is 1 where something is missing without which nothing runs.
"""

from __future__ import annotations

import argparse
import json

from rich.console import Console
from rich.table import Table
from rich.text import Text

from autodist_fx.cli.machine.findings import MISSING, OPTIONAL, Finding, look
from autodist_fx.cli.parser import DIFFERENT, SUCCESS
from cost_model.text_tables import WIDTH

EXAMPLES = (
    ("autodist-fx doctor", "first thing to send along with a report of a bug"),
    ("autodist-fx doctor --json", "the same as values"),
)
_STYLES = {MISSING: "bold red", OPTIONAL: "yellow"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `autodist-fx doctor`."""
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(args: argparse.Namespace) -> int:
    """Print what was found; return DIFFERENT where something is missing without which nothing runs."""
    findings = look()
    if args.json:
        print(json.dumps([finding.to_dict() for finding in findings], indent=1))
    else:
        _print(findings)
    return DIFFERENT if any(finding.state == MISSING for finding in findings) else SUCCESS


def _print(findings: list[Finding]) -> None:
    """Print the findings by topic, and what to do about those that are not well."""
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    for topic in dict.fromkeys(finding.topic for finding in findings):
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
        for column in ("state", "name", "said"):
            table.add_column(column, no_wrap=column != "said", overflow="fold")
        for finding in findings:
            if finding.topic == topic:
                state = Text(finding.state, _STYLES.get(finding.state, "green"))
                table.add_row(state, Text(finding.name), Text(finding.said))
        console.print(Text(topic, style="bold"), table, "", sep="\n")
    ways = [finding for finding in findings if finding.way_out]
    for finding in ways:
        console.print(Text(f"{finding.name}: {finding.way_out}"), soft_wrap=True)
    if not ways:
        console.print(Text("nothing is missing"))
