"""Run a split on this machine and print what each rank spends, by op, beside what the plan predicts.

A forward pass, a prompt and a step of decoding: kernels, waiting for other ranks, moving tensors, Python around the
programs, and transformers' loop outside of the model. A directory with a config and no weights will do: weights are
then drawn. What the clocks themselves cost is in the last line of each table: the same without them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from autodist_fx.cli.arguments import (
    add_model_arguments,
    at_least,
    be_quiet,
    checkpoint_source,
    compile_for,
    plan_options,
)
from autodist_fx.cli.parser import SUCCESS
from autodist_fx.compiler.compile import compile_model
from autodist_fx.compiler.compile_options import CompileOptions
from autodist_fx.errors import AutodistError
from autodist_fx.report.profile import Profile, phase_profile
from autodist_fx.report.terminal import print_profile
from autodist_fx.runtime.comm.agreement import over
from autodist_fx.runtime.comm.join_options import JoinOptions
from autodist_fx.runtime.comm.launch import launch_local
from autodist_fx.runtime.comm.process_group import started_by_torchrun
from autodist_fx.runtime.default_hardware import default_hardware
from autodist_fx.runtime.execution.phase_times import phase_times
from autodist_fx.startup.start_rank import start_rank
from autodist_fx.tracing import empty_model
from autodist_fx.weights.checkpoint_source import CheckpointSource
from autodist_fx.weights.dtype import wanted_dtype
from autodist_fx.weights.resolve import resolve_config
from autodist_fx.weights.sources.safetensors_source import weight_files
from cost_model.partition_plan import PartitionPlan
from cost_model.request.plan_options import PlanOptions

EXAMPLES = (
    ("autodist-fx profile --model smollm2 --tp 2", "a table for each of forward, prompt and step"),
    ("autodist-fx profile --model DIR --tp 2 --save profile.json", "kept, for a plan's page:"),
    ("autodist-fx show plan.json --html plan.html --profile profile.json", "what ran beside what was predicted"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `autodist-fx profile`."""
    add_model_arguments(parser)
    what = parser.add_argument_group("what is run")
    what.add_argument("--batch", type=at_least(1), default=1, metavar="N", help="sequences (1)")
    what.add_argument("--seq", type=at_least(1), default=128, metavar="N", help="tokens of each prompt (128)")
    what.add_argument("--new-tokens", type=at_least(3), default=32, metavar="K", help="tokens to generate (32)")
    said = parser.add_argument_group("what is printed")
    said.add_argument("--save", metavar="FILE", help="write it as JSON, for `autodist-fx show --profile`")
    said.add_argument("--json", action="store_true", help="print it as JSON")
    # The process that starts the ranks passes these to all of them: a plan, the weights, and where rank 0 writes.
    for option in ("--planned", "--weights", "--measured"):
        parser.add_argument(option, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Measure in ranks that this process starts, print the profile, and return the exit code."""
    be_quiet()
    if args.measured:
        _measure(args)
        return SUCCESS
    if started_by_torchrun():
        raise AutodistError("profile starts its ranks itself: run it without torchrun")
    wanted, config = plan_options(args), resolve_config(checkpoint_source(args))
    if config.is_encoder_decoder:
        raise AutodistError("profile is of models that go on from a prompt: this one has an encoder and a decoder")
    plan = compile_for(args, config, replace(wanted, sizes=_sizes(args, 1, args.seq + args.new_tokens // 2))).plan
    with tempfile.TemporaryDirectory(prefix="adx-profile-") as scratch, _weights(args, config) as weights:
        planned, measured = Path(scratch) / "plan.json", Path(scratch) / "measured.json"
        plan.save(planned)
        further = ["--planned", str(planned), "--weights", str(weights), "--measured", str(measured)]
        command = [sys.executable, "-m", "autodist_fx.cli.main", *args.argv, *further]
        code = launch_local(command, plan.mesh.size)
        if code:
            return code
        of_ranks = json.loads(measured.read_text(encoding="utf-8"))
    plans = {"decode": plan, **_predicted(args, config, wanted)}
    drawn = "" if _has_weights(args) else ", weights drawn"
    profile = Profile(
        plan.model,
        str(plan.mesh),
        f"{args.batch} x {args.seq} tokens, {args.new_tokens} new ones{drawn}; predicted for {plan.hardware}",
        tuple(phase_profile(name, [found[name] for found in of_ranks], plans[name]) for name in of_ranks[0]),
    )
    if args.save:
        profile.save(args.save)
    if args.json:
        print(profile.to_json())
    else:
        print_profile(profile)
    return SUCCESS


def _sizes(args: argparse.Namespace, tokens: int, past: int | None) -> tuple[tuple[str, int], ...]:
    sizes = (("B", args.batch), ("S", tokens))
    return sizes if past is None else (*sizes, ("P", past))


def _predicted(args: argparse.Namespace, config: PretrainedConfig, wanted: PlanOptions) -> dict[str, PartitionPlan]:
    """Return plans for the sizes of a prompt and of a forward pass, which say what these should take."""
    from autodist_fx.api.compiled_model import CompiledModel  # a rank does without what it imports

    anew = wanted if wanted.plan is None else PlanOptions.from_plan(wanted.plan)
    prefill = compile_for(args, config, replace(anew, sizes=_sizes(args, args.seq, 0))).plan
    model = empty_model(config, wanted_dtype(args.dtype, config))
    request = replace(anew, sizes=_sizes(args, args.seq, None)).resolve(default_hardware())
    forward = compile_model(model, CompiledModel, request, CompileOptions(verify=False)).plan
    return {"prefill": prefill, "forward": forward}


def _has_weights(args: argparse.Namespace) -> bool:
    """Return whether --model is more than a config: a directory without weights, or a config.json."""
    path = Path(args.model).expanduser()
    if path.is_dir():
        return bool(weight_files(path)) or any(path.glob("*.gguf"))
    return path.suffix != ".json" or not path.is_file()


@contextlib.contextmanager
def _weights(args: argparse.Namespace, config: PretrainedConfig) -> Iterator[Path]:
    """Write drawn weights for the time of the block where the model has none; give what the ranks are to load."""
    if _has_weights(args):
        yield Path(args.model)
        return
    shape = empty_model(config, wanted_dtype(args.dtype, config))
    with tempfile.TemporaryDirectory(prefix="adx-drawn-") as directory:
        model = type(shape)._from_config(config, dtype=shape.dtype)
        model.save_pretrained(directory)
        del model
        yield Path(directory)


def _measure(args: argparse.Namespace) -> None:
    """Measure as one of the ranks; rank 0 writes what all found."""
    source: CheckpointSource = replace(checkpoint_source(args), name=args.weights)
    wanted = PlanOptions.from_keywords(plan=args.planned, strict=args.strict)
    model: Any = start_rank(source, args.dtype, wanted, JoinOptions(), CompileOptions(), cache=False)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(0, vocabulary, (args.batch, args.seq), generator=generator).to(model.device)
    model.generation_config.eos_token_id = None  # so that all tokens are made
    found = json.dumps(phase_times(model, ids, args.new_tokens))
    texts = [found] if model.mesh.size == 1 else over(model.communicator, model.rank, model.mesh.size)(found)
    if model.rank == 0:
        Path(args.measured).write_text(f"[{','.join(texts)}]", encoding="utf-8")
