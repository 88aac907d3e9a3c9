"""Compile the program of every rank, from the model's config alone, and prove that they fit together."""

from __future__ import annotations

import argparse
import time

from autodist_fx.cli.arguments import add_model_arguments, be_quiet, compile_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    be_quiet()
    compiled = compile_config(args)
    began = time.perf_counter()
    compiled.verify()
    ranks = compiled.mesh.size
    print(
        f"{compiled.plan.model} on {compiled.mesh}: the program{'s' if ranks > 1 else ''} of {ranks} "
        f"rank{'s' if ranks > 1 else ''} made and verified in {time.perf_counter() - began:.1f} s"
    )
    return 0
