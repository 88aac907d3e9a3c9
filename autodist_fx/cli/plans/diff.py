"""Say what differs between two saved plans of one model: cuts, roles, bytes, memory and seconds, before and after.

Meshes and hardware may be different. The exit code is 0 when the plans are equal, 1 when they differ, 2 on errors.
"""

from __future__ import annotations

import argparse
import json

from autodist_fx.cli.parser import DIFFERENT, SUCCESS
from cost_model.partition_plan import PartitionPlan

EXAMPLES = (
    ("autodist-fx diff a100.json h100.json", "what other hardware changes in the plan"),
    ("autodist-fx diff before.json after.json --json", "the same as values; exit code 1 if anything differs"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `autodist-fx diff`."""
    parser.add_argument("before", metavar="A", help="a plan, as JSON")
    parser.add_argument("after", metavar="B", help="another plan, as JSON")
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the differences of two plans; return DIFFERENT where there are any."""
    diff = PartitionPlan.load(args.before).diff(PartitionPlan.load(args.after))
    if args.json:
        print(json.dumps(diff.to_dict(), indent=1))
    elif diff:
        print(diff)
    return DIFFERENT if diff else SUCCESS
