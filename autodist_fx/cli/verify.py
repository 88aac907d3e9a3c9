"""Compile the program of every rank, from the model's config alone, and prove that they fit together.

With --artifact: read a split from the disk, every file of it, and prove the same of that.
"""

from __future__ import annotations

import argparse
import time

from autodist_fx.artifact.load import Artifact
from autodist_fx.cli.arguments import add_model_arguments, be_quiet, compile_config
from autodist_fx.errors import AutodistError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, required=False)
    parser.add_argument("--artifact", metavar="DIR", help="of what `autodist-fx compile --out DIR` wrote; no --model")


def run(args: argparse.Namespace) -> int:
    be_quiet()
    if (args.model is None) == (args.artifact is None):
        raise AutodistError("name a model with --model, or a split on disk with --artifact")
    compiled = compile_config(args) if args.artifact is None else Artifact(args.artifact)
    began = time.perf_counter()
    compiled.verify()
    ranks = compiled.mesh.size
    print(
        f"{compiled.plan.model} on {compiled.mesh}: the program{'s' if ranks > 1 else ''} of {ranks} "
        f"rank{'s' if ranks > 1 else ''} {'made' if args.artifact is None else 'read'} and verified in "
        f"{time.perf_counter() - began:.1f} s"
    )
    return 0
