"""What several subcommands ask for: a model, a mesh, a plan."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig
from transformers.utils import logging

from cost_model.plan import PartitionPlan

if TYPE_CHECKING:
    from autodist_fx.compiled import CompiledModel

# What traces models is imported by those who do: it takes seconds, and a split on disk needs none of it.


def at_least(low: int) -> Any:
    """For `type=`: a whole number, `low` or more."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"{value} is less than {low}")
        return value

    return number


def add_model_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """--model, --tp, --pp, --plan and what goes with them."""
    model = parser.add_argument_group("the model and its split")
    model.add_argument(
        "--model",
        required=required,
        metavar="PATH|HUB_ID|smollm2",
        help="a directory, a .gguf file, or an id on the hub",
    )
    model.add_argument("--tp", type=at_least(1), metavar="N", help="ranks that share each tensor (1)")
    model.add_argument("--pp", type=at_least(1), metavar="M", help="pipeline stages (1)")
    model.add_argument("--plan", metavar="FILE", help="use this plan, made by `autodist-fx plan --save`")
    model.add_argument("--hardware", metavar="NAME", help="predict for cpu-gloo, a100, h100 or generic")
    model.add_argument("--objective", default="shard", choices=("shard", "latency"), help="of the search (shard)")
    model.add_argument("--dtype", default="auto", help="of the weights: auto (the checkpoint's), float32, bfloat16 ...")
    model.add_argument("--revision", help="of a model on the hub: a branch, a tag or a commit")
    model.add_argument("--cache-dir", metavar="DIR", help="where downloads are kept")


def compile_config(args: argparse.Namespace, sizes: dict[str, int] | None = None) -> CompiledModel:
    """The split of the model whose config --model has; no weights are looked for, nothing is verified."""
    from autodist_fx.pretrained import wanted_dtype
    from autodist_fx.weights.resolve import resolve_config

    config = resolve_config(args.model, revision=args.revision, cache_dir=args.cache_dir)
    return compile_for(args, config, wanted_dtype(args.dtype, config), sizes)


def compile_for(
    args: argparse.Namespace, config: PretrainedConfig, dtype: torch.dtype, sizes: dict[str, int] | None = None
) -> CompiledModel:
    """The same for a config that was found already."""
    from autodist_fx.pretrained import compile_for_generation, mesh_of
    from autodist_fx.tracing import empty_model

    plan = PartitionPlan.load(args.plan) if args.plan else None
    mesh = mesh_of(plan, args.tp, args.pp)
    return compile_for_generation(
        empty_model(config, dtype),
        tp=mesh.tp,
        pp=mesh.pp,
        hardware=args.hardware,
        objective=args.objective,
        plan=plan,
        sizes=sizes,
        verify=False,
    )


def be_quiet() -> None:
    """transformers' warnings are about its own options; ours are errors, or in the plan."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
