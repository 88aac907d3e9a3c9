"""Command line options that several subcommands share: the model, the mesh, the plan."""

from __future__ import annotations

import argparse
import inspect
import math
import warnings
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig
from transformers.utils import logging

from autodist_fx.errors import AutodistError
from autodist_fx.runtime.default_hardware import default_hardware
from autodist_fx.weights.checkpoint_source import ATTENTION, CheckpointSource
from cost_model.request.plan_options import PlanOptions
from cost_model.request.plan_request import OBJECTIVES

if TYPE_CHECKING:
    from autodist_fx.api.compiled_model import CompiledModel

# Functions that trace import the tracer themselves: that takes seconds, and a split on disk needs none of it.


def at_least(low: int, high: int | None = None) -> Any:
    """Return a parser for `type=` that takes a whole number from
    `low` to `high`, without upper bound where `high` is None."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"{value} is less than {low}")
        if high is not None and value > high:
            raise argparse.ArgumentTypeError(f"{value} is more than {high}")
        return value

    return number


def above_zero(text: str) -> float:
    """Parse a finite number above 0, for `type=`."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def probability(text: str) -> float:
    """Parse a number from 0 to 1, for `type=`."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def add_model_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add --model, --tp, --pp, --plan and the other options of a split."""
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
    model.add_argument("--hardware", metavar="NAME", help="predict for cpu-gloo, a100, h100, generic or a FILE")
    model.add_argument(
        "--objective", choices=OBJECTIVES, help="objective of the search (shard; with --devices: latency)"
    )
    model.add_argument(
        "--pin", action="append", type=_pin, metavar="PATTERN=ROLE", help="fix a role, as in *.q_proj=replicate"
    )
    model.add_argument(
        "--cut", action="append", type=_cut, metavar="MODULE|N", help="begin the next stage at this module or layer"
    )
    model.add_argument(
        "--max-memory", metavar="40GiB[,..]", help="memory of a device for weights and caches; or of each stage's"
    )
    model.add_argument("--device-map", metavar="A[=40GiB],B,..", help="hardware (and memory) of each stage's devices")
    model.add_argument("--strict", action="store_true", help="refuse a plan with ops that have no sharding rule")
    model.add_argument(
        "--dtype", default="auto", help="dtype of the weights: auto (the checkpoint's), float32, bfloat16 ..."
    )
    model.add_argument("--revision", help="revision of a model on the hub: a branch, a tag or a commit")
    model.add_argument("--cache-dir", metavar="DIR", help="where downloads are kept")
    model.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python files of a model that transformers has not"
    )
    model.add_argument("--attn-implementation", choices=ATTENTION, help="attention to trace (the config's, or sdpa)")


def _pin(text: str) -> tuple[str, str]:
    """Parse PATTERN=ROLE into (pattern, role)."""
    pattern, equals, role = text.rpartition("=")
    if not (pattern and equals and role):
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=ROLE")
    return pattern, role


def _cut(text: str) -> int | str:
    """Parse a layer's number or a module path."""
    return int(text) if text.isdecimal() else text


def plan_options(args: argparse.Namespace) -> PlanOptions:
    """Read the options of a split. Raises AutodistError for options that contradict each other."""
    return PlanOptions.from_keywords(**plan_keywords(args))


def plan_keywords(args: argparse.Namespace) -> dict[str, Any]:
    """Read the options of a split, as the keywords of `compile` and `train`. Raises AutodistError for options that
    contradict each other."""
    pin: dict[str, str] = {}
    for pattern, role in args.pin or ():
        if pin.setdefault(pattern, role) != role:
            raise AutodistError(f"--pin {pattern} is given twice, as {pin[pattern]} and as {role}: leave one out")
    memory = args.max_memory.split(",") if args.max_memory else None
    devices = None
    if args.device_map and args.hardware:
        raise AutodistError("--device-map names the hardware of every stage: leave --hardware out")
    if args.device_map:
        entries = [entry.partition("=") for entry in args.device_map.split(",")]
        devices = [{"hardware": name} | ({"memory": size} if size else {}) for name, _, size in entries]
    return {
        "tp": args.tp,
        "pp": args.pp,
        "hardware": args.hardware,
        "objective": args.objective,
        "pin": pin,
        "cuts": args.cut,
        "max_memory": memory[0] if memory and len(memory) == 1 else memory,
        "device_map": devices,
        "plan": args.plan,
        "strict": args.strict,
    }


def checkpoint_source(args: argparse.Namespace) -> CheckpointSource:
    """Return the checkpoint that --model names."""
    return CheckpointSource(
        args.model,
        revision=args.revision,
        cache_dir=args.cache_dir,
        trust_remote_code=args.trust_remote_code,
        attn_implementation=args.attn_implementation,
    )


def compile_config(args: argparse.Namespace, wanted: PlanOptions) -> CompiledModel:
    """Compile the model whose config --model has, without reading its weights and without verifying."""
    from autodist_fx.weights.resolve import resolve_config

    return compile_for(args, resolve_config(checkpoint_source(args)), wanted)


def compile_for_training(args: argparse.Namespace) -> CompiledModel:
    """Compile the model whose config --model has to train it, with labels among the inputs where forward takes them;
    without its weights and without verifying."""
    from autodist_fx.api.compiled_model import CompiledModel
    from autodist_fx.compiler.compile import compile_model
    from autodist_fx.compiler.compile_options import CompileOptions
    from autodist_fx.tracing import empty_model
    from autodist_fx.tracing.example_inputs import default_inputs
    from autodist_fx.weights.dtype import wanted_dtype
    from autodist_fx.weights.resolve import resolve_config

    config = resolve_config(checkpoint_source(args))
    model = empty_model(config, wanted_dtype(args.dtype, config))
    names = default_inputs(model, use_cache=False)
    if "labels" in inspect.signature(model.forward).parameters:
        names = (*names, "labels")
    wanted, options = plan_options(args), CompileOptions(input_names=names, train=True, verify=False)
    return compile_model(model, CompiledModel, wanted.resolve(default_hardware()), options, wanted.plan)


def compile_for(
    args: argparse.Namespace,
    config: PretrainedConfig,
    wanted: PlanOptions,
    *,
    verify: bool = False,
    verbose: bool = False,
) -> CompiledModel:
    """Compile a config that was found already; with `verify`, prove
    the programs; with `verbose`, print what each pass did."""
    from autodist_fx.api.compiled_model import CompiledModel
    from autodist_fx.compiler.compile import as_used, compile_model
    from autodist_fx.compiler.compile_options import CompileOptions
    from autodist_fx.tracing import empty_model
    from autodist_fx.weights.dtype import wanted_dtype

    model = empty_model(config, wanted_dtype(args.dtype, config))
    options = as_used(model, CompileOptions(verify=verify, verbose=verbose))
    return compile_model(model, CompiledModel, wanted.resolve(default_hardware()), options, wanted.plan)


def be_quiet() -> None:
    """Silence transformers' warnings, which are about its own
    options, and print ours in one line without their source."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.formatwarning = lambda message, *_, **__: f"autodist-fx: warning: {message}\n"
