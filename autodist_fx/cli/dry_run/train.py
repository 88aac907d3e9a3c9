"""Prints what `autodist-fx train` would do: the plan, the ranks and files, and a step as it is predicted."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from autodist_fx.api.choose_training import choose_training_for
from autodist_fx.cli.arguments import checkpoint_source, compile_for_training, plan_options
from autodist_fx.cli.dry_run.facts import print_facts, refuse_dry_rank, started_text, weights_text
from autodist_fx.runtime.device.choice import choose_device
from autodist_fx.tracing import empty_model
from autodist_fx.training.text_batches import TextBatches
from autodist_fx.weights.dtype import wanted_dtype
from autodist_fx.weights.resolve import resolve_config
from cost_model.errors import MeshError, NoPlanFits
from cost_model.format import bytes_text, seconds_text
from cost_model.mesh import Mesh
from cost_model.training.choice import TrainingWishes
from cost_model.training.estimate import StepEstimate


def print_dry_run(args: argparse.Namespace, batches: TextBatches) -> None:
    """Print the plan of one replica, and what the command would start, read and write. Raises AutodistError where the
    command would, as far as that can be known without weights."""
    refuse_dry_rank(None)
    mesh = Mesh(tp=args.tp or 1, pp=args.pp or 1, dp=args.dp)
    device = choose_device(args.device, mesh.size - 1).type
    step = _predicted(args, mesh, batches)
    plan = compile_for_training(args).plan if isinstance(step, str) else step.plan
    print(plan)
    steps = args.steps or args.epochs * batches.steps_an_epoch
    epoch = f"{batches.steps_an_epoch} steps an epoch of {args.batch_size} texts"
    print_facts(
        ("starts", started_text(mesh, device, args.argv)),
        ("reads", f"{args.data}: {epoch}; {steps} steps in all"),
        ("holds", weights_text(plan)),
        ("a step", _step_text(step)),
        ("writes", f"{Path(args.out)}: the run every {args.save_steps} steps, the log, and the model at the end"),
    )


def _predicted(args: argparse.Namespace, mesh: Mesh, batches: TextBatches) -> StepEstimate | str:
    """Predict a step with AdamW at the first batch's length; or return why that cannot be."""
    if args.cut or args.plan or args.device_map:
        return "not predicted with --cut, --plan or --device-map"
    config = resolve_config(checkpoint_source(args))
    wishes = TrainingWishes(
        devices=mesh.size, global_batch=args.batch_size, tp=mesh.tp, pp=mesh.pp, dp=mesh.dp, schedule=args.schedule,
        microbatches=args.microbatches or mesh.pp, zero_stage=args.zero_stage,
        recompute=None if args.recompute == "auto" else args.recompute,
    )  # fmt: skip
    length = batches.batch(0)["input_ids"].shape[1]
    wanted = replace(plan_options(args), tp=None, pp=None, sizes=(("S", length),))
    try:
        return choose_training_for(empty_model(config, wanted_dtype(args.dtype, config)), wanted, wishes).best
    except (MeshError, NoPlanFits) as error:
        return f"not predicted: {error}"


def _step_text(step: StepEstimate | str) -> str:
    if isinstance(step, str):
        return step
    return (
        f"predicted at {dict(step.plan.sizes).get('S')} tokens a text: {seconds_text(step.seconds)}, of which "
        f"{step.timeline.idle_share:.0%} idle, and {bytes_text(step.memory_bytes)} on the fullest rank"
    )
