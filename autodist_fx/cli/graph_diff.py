"""Print the unified diff from the whole model's graph to one rank's graph, and count what changed."""

from __future__ import annotations

import argparse

from autodist_fx.cli.arguments import add_model_arguments, at_least, be_quiet, compile_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--rank", type=at_least(0), default=0, metavar="R", help="global rank: stage * tp + tp_rank")


def run(args: argparse.Namespace) -> int:
    be_quiet()
    compiled = compile_config(args)
    diff = compiled.graph_diff(args.rank).splitlines()
    print("\n".join(diff))
    added = sum(line.startswith("+") and not line.startswith("+++") for line in diff)
    removed = sum(line.startswith("-") and not line.startswith("---") for line in diff)
    print(f"rank {args.rank} of {compiled.mesh}: {removed} lines of the whole graph removed, {added} added")
    return 0
