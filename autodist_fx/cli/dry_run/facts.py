"""Says in words which processes a command would start, and what each rank would hold."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from autodist_fx.errors import AutodistError
from autodist_fx.report.memory import memory_rows
from autodist_fx.runtime.comm.process_group import started_by_torchrun
from cost_model.format import bytes_text, ranges_text
from cost_model.mesh import Mesh
from cost_model.partition_plan import PartitionPlan
from cost_model.text_tables import table


def refuse_dry_rank(rank: int | None) -> None:
    """Raise AutodistError in a process that is one rank of several: --dry-run speaks for them all."""
    if rank is not None or started_by_torchrun():
        raise AutodistError("--dry-run says what a command would start, and this is one rank of it: leave it out")


def print_facts(*facts: tuple[str, str]) -> None:
    """Print the facts of a dry run, under the plan."""
    print("\nDry run: nothing is started, and no weights are read")
    print("\n".join(table([("", ""), *facts], left=(0, 1))[2:]))


def started_text(mesh: Mesh, device: str, argv: Sequence[str]) -> str:
    """Say which processes a command would start."""
    if mesh.size == 1:
        return f"no further process: this one is the one rank, on {device}"
    over = "Gloo and shared memory" if device == "cpu" else "NCCL"
    command = shlex.join([word for word in argv if word != "--dry-run"])
    return f"{mesh.size} ranks of this machine ({mesh}), on {device} over {over}, each with: autodist-fx {command}"


def weights_text(plan: PartitionPlan) -> str:
    """Say how many bytes of weights each rank would hold."""
    said = []
    for _, ranks, parts in memory_rows(plan):
        many, each = ("s", " each") if len(ranks) > 1 else ("", "")
        said.append(f"rank{many} {ranges_text(ranks)} {bytes_text(dict(parts)['weights'])}{each}")
    return f"weights: {', '.join(said)}"
