"""Print how a model would be split: stages, each linear's role, bytes, seconds and memory.

Reads the model's config only: of a model on the hub nothing but config.json is downloaded.
"""

from __future__ import annotations

import argparse
import sys

from autodist_fx.cli.arguments import add_model_arguments, at_least, be_quiet, compile_config
from cost_model.plan_json import plan_to_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--batch", type=at_least(1), help="sequences to predict for (1)")
    parser.add_argument("--seq", type=at_least(1), help="tokens a step to predict for (1: decoding)")
    parser.add_argument("--past", type=at_least(0), help="tokens cached before that step (512)")
    parser.add_argument("--save", metavar="FILE", help="write the plan, as JSON, for --plan")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(args: argparse.Namespace) -> int:
    be_quiet()
    given = {"B": args.batch, "S": args.seq, "P": args.past}
    plan = compile_config(args, sizes={symbol: n for symbol, n in given.items() if n is not None}).plan
    print(plan_to_text(plan) if args.json else plan)
    if args.save:
        plan.save(args.save)
        print(f"saved to {args.save}", file=sys.stderr)
    return 0
