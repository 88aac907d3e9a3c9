"""Write a split to disk: the plan, every rank's graph and weights, config and tokenizer, for `run --artifact`.

Needs the checkpoint; running it afterwards does not. One rank's weights are in memory at a time.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from autodist_fx.artifact.directory import refuse_foreign
from autodist_fx.artifact.writer import save_compiled
from autodist_fx.cli.arguments import add_model_arguments, be_quiet, checkpoint_source, compile_for, plan_options
from autodist_fx.compiler.variant import Variant
from autodist_fx.errors import CheckpointError
from autodist_fx.weights.checkpoint import load_tokenizer, open_source
from autodist_fx.weights.load_program import load_program
from autodist_fx.weights.resolve import resolve
from autodist_fx.weights.versions import named_as_in
from passes.program.rank_program import RankProgram

EXAMPLES = (
    ("autodist-fx compile --model smollm2 --tp 2 --out smollm2-tp2", "all that the ranks need, as files"),
    ("autodist-fx run --artifact smollm2-tp2 --prompt Hello", "start from them"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `autodist-fx compile`."""
    add_model_arguments(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="an artifact that is there already is replaced")
    parser.add_argument("--no-verify", action="store_true", help="do not prove the ranks' programs first")
    parser.add_argument("--verbose", action="store_true", help="print what each pass did to each rank's graph")


def run(args: argparse.Namespace) -> int:
    """Compile, save and report a split; return the exit code."""
    be_quiet()
    began, out = time.perf_counter(), Path(args.out).expanduser()
    refuse_foreign(out)
    checkpoint = resolve(checkpoint_source(args))
    compiled = compile_for(args, checkpoint.config, plan_options(args), verify=not args.no_verify, verbose=args.verbose)
    try:
        tokenizer = load_tokenizer(checkpoint)
    except CheckpointError:
        tokenizer = None  # not every model reads text
    model = compiled.source.shape
    source = named_as_in(model, open_source(checkpoint))

    def load(variant: Variant, program: RankProgram) -> None:
        buffers = dict(variant.traced.graph_module.named_buffers(remove_duplicate=False))
        load_program(model, source, buffers, program)
        program.graph_module.eval()

    try:
        save_compiled(
            compiled, model, out, load, generation_config=checkpoint.generation_config, tokenizer=tokenizer
        )
    finally:
        source.close()
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(
        f"{compiled.plan.model} on {compiled.mesh}: {size / 2**20:.0f} MiB written to {args.out} in "
        f"{time.perf_counter() - began:.1f} s"
    )
    return 0
