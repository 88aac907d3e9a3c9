"""Starts the ranks of a command as processes of this machine, each of which runs the same command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

import torch

from autodist_fx.cli.main import main_of_fork
from autodist_fx.runtime.comm.launch import launch_local


def start_ranks(
    argv: Sequence[str],
    world_size: int,
    device: torch.device,
    env: Mapping[str, str] | None = None,
    keep_open: Sequence[int] = (),
) -> int:
    """Run `autodist-fx argv` in `world_size` ranks until all have ended, and return the exit code; see launch_local.

    Ranks on the CPU are forks of this process, which spares them the imports: some seconds. A fork has none of the
    threads that this process computes with, so it must not have any by now; see `compute_alone`.
    """
    given = {"TOKENIZERS_PARALLELISM": os.environ.get("TOKENIZERS_PARALLELISM", "false"), **(env or {})}
    return launch_local(
        [sys.executable, "-m", "autodist_fx.cli.main", *argv],
        world_size,
        given,
        keep_open=keep_open,
        forked=(lambda: main_of_fork(argv)) if device.type == "cpu" else None,
    )


def compute_alone() -> None:
    """Let this process compute with one thread, before it computes anything: it starts ranks, and fork keeps none."""
    torch.set_num_threads(1)
