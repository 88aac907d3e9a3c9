"""Print how a model would be split: stages, each linear's role, bytes, seconds and memory.

Reads the model's config only: of a model on the hub nothing but config.json is downloaded.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace

from autodist_fx.api.choose_mesh import choose_mesh_for
from autodist_fx.cli.arguments import (
    add_model_arguments,
    at_least,
    be_quiet,
    checkpoint_source,
    compile_config,
    plan_options,
)
from autodist_fx.cli.plans.plan_training import add_training_arguments, plan_training, refuse_without_train
from autodist_fx.compiler.compile import as_used
from autodist_fx.compiler.compile_options import CompileOptions
from autodist_fx.errors import AutodistError
from autodist_fx.tracing import empty_model
from autodist_fx.weights.dtype import wanted_dtype
from autodist_fx.weights.resolve import resolve_config
from cost_model.plan.write_json import plan_to_text
from cost_model.request.plan_options import PlanOptions
from cost_model.search.mesh_choice import MeshChoice

EXAMPLES = (
    ("autodist-fx plan --model smollm2 --tp 2 --pp 2", "stages, roles, bytes, seconds and memory of one mesh"),
    ("autodist-fx plan --model DIR --devices 8 --hardware h100", "which tp and pp to use, and the runners-up"),
    ('autodist-fx plan --model DIR --tp 2 --pin "*.q_proj=replicate" --save plan.json', "fix choices, keep the plan"),
    ("autodist-fx plan --model DIR --train --devices 8 --global-batch 128", "how to train: mesh, schedule, savings"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `autodist-fx plan`."""
    add_model_arguments(parser)
    asked = parser.add_argument_group("what is asked")
    asked.add_argument(
        "--devices", type=at_least(1), metavar="N", help="choose tp and pp for so many devices, and show the runners-up"
    )
    asked.add_argument(
        "--sequences", type=at_least(1), metavar="N", help="in flight over all --devices, by throughput (what fits)"
    )
    asked.add_argument(
        "--from", dest="from_file", metavar="FILE", help="plan anew what this plan file asks for, as edited by hand"
    )
    asked.add_argument("--batch", type=at_least(1), help="sequences to predict for (1)")
    asked.add_argument("--seq", type=at_least(1), help="tokens a step to predict for (1: decoding)")
    asked.add_argument("--past", type=at_least(0), help="tokens cached before that step (512)")
    output = parser.add_argument_group("what is printed")
    output.add_argument("--save", metavar="FILE", help="write the plan, as JSON, for --plan")
    output.add_argument("--json", action="store_true", help="print the plan as JSON")
    add_training_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Make, print and save a plan; return the exit code."""
    be_quiet()
    if args.from_file and args.plan:
        raise AutodistError("--plan uses a plan as it is, --from makes it anew: give one of them")
    refuse_without_train(args)
    by_symbol = {"B": args.batch, "S": args.seq, "P": args.past}
    sizes = tuple((symbol, n) for symbol, n in by_symbol.items() if n is not None)
    wanted = replace(plan_options(args), sizes=sizes)
    if args.from_file:
        wanted = wanted.or_else(PlanOptions.from_file(args.from_file))  # the command line wins over the file
    if args.train:
        return plan_training(args, wanted)
    loaded = args.devices is not None and args.objective == "throughput"
    if args.sequences is not None and not loaded:
        both = "--devices N --objective throughput"
        raise AutodistError(f"--sequences counts for {both} alone: leave it out, or give both")
    if args.batch is not None and loaded:
        raise AutodistError("each mesh gets a batch of its own by throughput: leave --batch out, or give --sequences")
    if args.devices is not None:
        choice = choose_for(args, wanted)
        plan = choice.best.plan
        print(json.dumps(choice.to_dict(), indent=1) if args.json else choice)
    else:
        plan = compile_config(args, wanted).plan
        print(plan_to_text(plan) if args.json else plan)
    if args.save:
        plan.save(args.save)
        print(f"saved to {args.save}", file=sys.stderr)
    return 0


def choose_for(args: argparse.Namespace, wanted: PlanOptions) -> MeshChoice:
    """Choose a mesh for --devices; the mesh in `wanted`, which comes from a plan file, is ignored."""
    for name in ("tp", "pp", "plan", "device_map"):
        if getattr(args, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise AutodistError(f"--devices chooses tp and pp, for devices that are alike: leave out {option}")
    config = resolve_config(checkpoint_source(args))
    shape = empty_model(config, wanted_dtype(args.dtype, config))
    on_any = replace(wanted, tp=None, pp=None, device_map=None, objective=args.objective or "latency")
    return choose_mesh_for(shape, args.devices, on_any, as_used(shape, CompileOptions()), args.sequences)
