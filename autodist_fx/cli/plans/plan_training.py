"""The options of `autodist-fx plan --train`, and what it prints: how to train, and a step's simulated schedule."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace

from autodist_fx.cli.arguments import at_least, checkpoint_source
from autodist_fx.errors import AutodistError
from autodist_fx.report.page import write_page
from autodist_fx.report.schedule import schedule_text
from autodist_fx.runtime.training.schedules import SCHEDULES
from autodist_fx.tracing import empty_model
from autodist_fx.weights.dtype import wanted_dtype
from autodist_fx.weights.resolve import resolve_config
from cost_model.request.plan_options import PlanOptions
from cost_model.training.choice import TrainingWishes

_TRAINING = ("global_batch", "dp", "microbatches", "schedule", "recompute", "zero_stage", "html")
_DEFAULT_LENGTH = 2048  # tokens of a sequence, where --seq does not say


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --train and the options that go with it."""
    training = parser.add_argument_group("training: what is not given is chosen")
    training.add_argument("--train", action="store_true", help="predict a training step with AdamW on each mesh")
    training.add_argument("--global-batch", type=at_least(1), metavar="N", help="sequences of a step, over all devices")
    training.add_argument("--dp", type=at_least(1), metavar="N", help="replicas of the model")
    training.add_argument("--microbatches", type=at_least(1), metavar="N", help="parts of a replica's sequences")
    training.add_argument("--schedule", choices=SCHEDULES, help="order of forward and backward passes")
    training.add_argument("--recompute", choices=("none", "layers"), help="activations computed again in backward")
    training.add_argument("--zero-stage", type=int, choices=(0, 1), help="1: optimizer states once over dp")
    training.add_argument("--html", metavar="FILE", help="write the plan's page with the step's timeline")


def refuse_without_train(args: argparse.Namespace) -> None:
    """Raise AutodistError for an option that says nothing without --train."""
    given = [name for name in _TRAINING if getattr(args, name) is not None]
    if given and not args.train:
        raise AutodistError(f"--{given[0].replace('_', '-')} is of --train: add that, or leave it out")


def plan_training(args: argparse.Namespace, wanted: PlanOptions) -> int:
    """Choose how to train, print it, and save the plan or its page; return the exit code."""
    if args.global_batch is None:
        raise AutodistError("--train needs --global-batch N, the sequences of a step over all devices")
    for name in ("plan", "from_file", "device_map", "cut", "batch", "past", "sequences"):
        if getattr(args, name) is not None:
            option = {"from_file": "from", "device_map": "device-map"}.get(name, name)
            raise AutodistError(f"--train chooses for devices that are alike: leave out --{option}")
    from autodist_fx.api.choose_training import choose_training_for  # tracing takes seconds to import

    devices = args.devices
    if devices is None:
        if None in (args.tp, args.pp, args.dp):
            raise AutodistError("--train needs --devices N, or all of --tp, --pp and --dp")
        devices = args.tp * args.pp * args.dp
    wishes = TrainingWishes(
        devices=devices,
        global_batch=args.global_batch,
        tp=args.tp,
        pp=args.pp,
        dp=args.dp,
        microbatches=args.microbatches,
        schedule=args.schedule,
        recompute=args.recompute,
        zero_stage=args.zero_stage,
    )
    config = resolve_config(checkpoint_source(args))
    sizes = {"S": args.seq or _DEFAULT_LENGTH}
    on_any = replace(wanted, tp=None, pp=None, sizes=tuple(sizes.items()))
    choice = choose_training_for(empty_model(config, wanted_dtype(args.dtype, config)), on_any, wishes)
    if args.json:
        print(json.dumps(choice.to_dict(), indent=1))
    else:
        print(choice)
        print(f"\n{schedule_text(choice.best.timeline)}")
    if args.save:
        choice.best.plan.save(args.save)
        print(f"saved to {args.save}", file=sys.stderr)
    if args.html:
        write_page(args.html, choice.best.plan, choice.best.timeline)
    return 0
