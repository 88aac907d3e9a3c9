"""Show a saved plan: as tables in the terminal, as one HTML page, or for Graphviz.

FILE is what `autodist-fx plan --save` wrote. Neither torch nor the model is needed.
"""

from __future__ import annotations

import argparse

from autodist_fx.errors import AutodistError
from cost_model.partition_plan import PartitionPlan

EXAMPLES = (
    ("autodist-fx show plan.json", "tables, with colours and bars in a terminal"),
    ("autodist-fx show plan.json --html plan.html", "one page: stages, timeline, memory, every weight's split"),
    ("autodist-fx show plan.json --dot - | dot -Tsvg > plan.svg", "a drawing by Graphviz"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `autodist-fx show`."""
    parser.add_argument("plan", metavar="FILE", help="a plan, as JSON")
    parser.add_argument("--html", metavar="FILE", help="write one self-contained page; - is standard output")
    parser.add_argument(
        "--profile", metavar="FILE", help="show on the page what `autodist-fx profile --save FILE` measured"
    )
    parser.add_argument("--dot", metavar="FILE", help="write a graph for Graphviz; - is standard output")


def run(args: argparse.Namespace) -> int:
    """Print a plan as tables, or write it as HTML or DOT; return the exit code."""
    plan = PartitionPlan.load(args.plan)
    if args.profile and not args.html:
        raise AutodistError("--profile is shown on the page: add --html FILE")
    if args.html:
        from autodist_fx.report.page import write_page
        from autodist_fx.report.profile import Profile

        write_page(args.html, plan, profile=Profile.load(args.profile) if args.profile else None)
    if args.dot:
        from autodist_fx.report.dot import plan_dot
        from autodist_fx.report.page import write_text

        write_text(args.dot, plan_dot(plan))
    if not (args.html or args.dot):
        from autodist_fx.report.terminal import print_plan

        print_plan(plan)
    return 0
