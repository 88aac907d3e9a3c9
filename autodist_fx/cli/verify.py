"""Compile the program of every rank, from the model's config alone, and prove that they fit together.

With --artifact: read a split from the disk, every file of it, and prove the same of that.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from autodist_fx.api.artifact import Artifact
from autodist_fx.cli.arguments import (
    add_model_arguments,
    at_least,
    be_quiet,
    checkpoint_source,
    compile_config,
    compile_for_training,
    plan_keywords,
    plan_options,
)
from autodist_fx.errors import AutodistError
from autodist_fx.numeric.verify_numeric import verify_numeric_of
from autodist_fx.runtime.training.schedules import SCHEDULES
from autodist_fx.simulation.simulator import Simulator
from autodist_fx.weights.resolve import resolve_config
from cost_model.request.plan_options import PlanOptions

EXAMPLES = (
    ("autodist-fx verify --model smollm2 --tp 2 --pp 2", "the static proof, of all ranks, from the config alone"),
    ("autodist-fx verify --model smollm2 --tp 2 --numeric", "and all ranks run in float64, against the model's graph"),
    ("autodist-fx verify --model smollm2 --tp 2 --train --steps 3", "steps of training, against one process"),
)
_OF_STEPS = ("dp", "schedule", "microbatches", "zero_stage", "recompute")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `autodist-fx verify`."""
    add_model_arguments(parser, required=False)
    what = parser.add_argument_group("what is verified")
    what.add_argument("--artifact", metavar="DIR", help="what `autodist-fx compile --out DIR` wrote; no --model")
    what.add_argument(
        "--numeric", action="store_true",
        help="also run all ranks in this process, in float64 on drawn weights, and compare with the model's own graph",
    )  # fmt: skip
    what.add_argument(
        "--train", action="store_true", help="verify programs for training, and what their backward pass owes"
    )
    steps = parser.add_argument_group("steps of training, in float64 on drawn weights, against one process")
    steps.add_argument("--steps", type=at_least(1), metavar="N", help="train so many steps, and compare after each")
    steps.add_argument("--dp", type=at_least(1), metavar="D", help="replicas (1)")
    steps.add_argument("--schedule", choices=tuple(SCHEDULES), help="of the pipeline's passes (1f1b)")
    steps.add_argument("--microbatches", type=at_least(1), metavar="N", help="parts of a replica's rows (pp)")
    steps.add_argument("--zero-stage", type=int, choices=(0, 1), help="1: optimizer states once over dp (0)")
    steps.add_argument("--recompute", choices=("none", "layers"), help="layers: computed again in backward (none)")


def run(args: argparse.Namespace) -> int:
    """Prove the programs of a model or an artifact, report the seconds it took, and return the exit code."""
    be_quiet()
    if (args.model is None) == (args.artifact is None) or (args.artifact and args.train):
        raise AutodistError("name a model with --model, or a split on disk with --artifact, which is for inference")
    of_steps = [name for name in _OF_STEPS if getattr(args, name) is not None]
    if (args.steps is not None and not args.train) or (of_steps and args.steps is None):
        raise AutodistError("--steps N trains, and the options beside it say how: give --train --steps N, or leave out "
                            f"--{(of_steps or ['steps'])[0].replace('_', '-')}")  # fmt: skip
    if args.artifact and plan_options(args) != PlanOptions():
        raise AutodistError("a split on disk has its mesh and its plan: leave the options of a split out")
    if args.artifact:
        compiled: Simulator = Artifact(args.artifact).whole
    else:
        compiled = compile_for_training(args) if args.train else compile_config(args, plan_options(args))
    began = time.perf_counter()
    compiled.verify()
    ranks = compiled.mesh.size
    print(
        f"{compiled.plan.model} on {compiled.mesh}: the program{'s' if ranks > 1 else ''} of {ranks} "
        f"rank{'s' if ranks > 1 else ''} {'made' if args.artifact is None else 'read'} and verified in "
        f"{time.perf_counter() - began:.1f} s"
    )
    if args.numeric:
        began = time.perf_counter()
        verify_numeric_of(compiled)
        seconds = time.perf_counter() - began
        print(f"run in float64 against the model's own graph: all that leaves a rank is equal ({seconds:.1f} s)")
    if args.steps is not None:
        _compare_steps(args)
    return 0


def _compare_steps(args: argparse.Namespace) -> None:
    """Train on the mesh, all ranks in this process, and in one process, and print each step on which they agree."""
    from autodist_fx.api.train import train
    from autodist_fx.training.check_steps import MAX_NORM, adamw, compare_steps, drawn_model, tolerance_of, truth_of

    began = time.perf_counter()
    model = drawn_model(resolve_config(checkpoint_source(args)))
    microbatches = args.microbatches or args.pp or 1
    common: dict[str, Any] = {
        "simulate": True, "optimizer": adamw, "max_grad_norm": MAX_NORM, "verify": False, "microbatches": microbatches
    }  # fmt: skip
    engine = train(
        model, dp=args.dp or 1, schedule=args.schedule or "1f1b", zero_stage=args.zero_stage or 0,
        recompute=args.recompute or "none", **common,
        **{**plan_keywords(args), "tp": args.tp or 1, "pp": args.pp or 1, "objective": args.objective or "shard"},
    )  # fmt: skip
    truth, said = truth_of(model, train(model, **common))
    print(f"trained in float64 on drawn weights; the truth is {said}")
    rows = (args.dp or 1) * microbatches + 1  # so that microbatches differ in rows
    for done in compare_steps(model, engine, truth, args.steps, rows, tolerance_of(model)):
        print(
            f"step {done.step}: loss {done.loss:.6f}; all parameters and states are equal, {done.tensor} least: "
            f"{done.error:.1g}"
        )
    print(f"{args.steps} steps on {engine.mesh} are those of one process ({time.perf_counter() - began:.1f} s)")
