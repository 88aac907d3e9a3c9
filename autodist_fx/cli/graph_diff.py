"""Print the unified diff from the whole model's graph to one rank's graph, and count what changed."""

from __future__ import annotations

import argparse
import json

from autodist_fx.cli.arguments import add_model_arguments, at_least, be_quiet, compile_config, plan_options

EXAMPLES = (
    ("autodist-fx graph-diff --model smollm2 --tp 2 --rank 0", "9 heads become 6 on this rank: see the views"),
    ("autodist-fx graph-diff --model smollm2 --tp 2 --pp 2 --rank 3 --json", "how many nodes of each op changed"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `autodist-fx graph-diff`."""
    add_model_arguments(parser)
    parser.add_argument("--rank", type=at_least(0), default=0, metavar="R", help="global rank: stage * tp + tp_rank")
    parser.add_argument("--json", action="store_true", help="print the counts alone, as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the diff and the counts; return the exit code."""
    be_quiet()
    wanted = plan_options(args)
    wanted.mesh.coordinates(args.rank)  # names a rank that is not there, before the seconds that tracing takes
    compiled = compile_config(args, wanted)
    changes = compiled.graph_changes(args.rank)
    if args.json:
        print(json.dumps({"rank": args.rank, **changes.to_dict()}, indent=1))
        return 0
    if changes:
        print(compiled.graph_diff(args.rank))
        print()
    print(f"rank {args.rank} of {compiled.mesh}, nodes of its graph against the whole one's:")
    print(changes or "nothing changed")
    return 0
