"""Saves a run, all ranks together: at once, or copied at once and written by threads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autodist_fx.errors import AutodistError
from autodist_fx.runtime.comm.agreement import Everyone, over
from autodist_fx.runtime.training.optimizer import OptimizerOptions, ShardOptimizer
from autodist_fx.runtime.training.rank_trainer import RankTrainer
from autodist_fx.runtime.training.replica_communicator import TrainingCommunicator
from autodist_fx.runtime.training.state_pieces import WEIGHT, state_pieces
from autodist_fx.training.checkpoint.directory import new_scratch
from autodist_fx.training.checkpoint.manifest import Head, tensor_name
from autodist_fx.training.checkpoint.plain import to_plain
from autodist_fx.training.checkpoint.share import Share, share_of
from autodist_fx.training.checkpoint.write import BackgroundWrite, commit, say_failed, wait_for_marks, write_share

_MARKS_TIMEOUT_SECONDS = 600.0  # after the last rank that has written its share


@dataclass(frozen=True, slots=True)
class Save:
    """One rank's part of a save: what it writes, and where to."""

    rank: int
    ranks: int
    scratch: Path
    head: Head
    share: Share


def begin_save(
    trainer: RankTrainer, communicator: TrainingCommunicator, directory: Path, head: Head, parameters: Sequence[str]
) -> Save:
    """Agree with all ranks on what each writes into a new directory in `directory`; nothing is written yet.

    `parameters`: the names of all that the model has; `head` lacks options and unused ones.

    Raises CheckpointError where none can be made, AutodistError for an optimizer whose state cannot be saved.
    """
    rank, size = trainer.rank, trainer.mesh.size
    everyone = over(communicator, rank, size)
    options = _common_options(trainer.optimizer, everyone)
    pieces = state_pieces(trainer)
    scratch = Path(everyone(str(new_scratch(directory, head.step)) if rank == 0 else "")[0])
    share = share_of(rank, pieces, everyone)
    unused = tuple(name for name in parameters if tensor_name(name, WEIGHT) not in share.whole)
    return Save(rank, size, scratch, replace(head, options=options, unused=unused), share)


def save_now(save: Save, communicator: TrainingCommunicator) -> None:
    """Write what all ranks have to write; return when it is in place. Called on all ranks."""
    try:
        write_share(save.scratch, save.rank, save.share)
        over(communicator, save.rank, save.ranks)("")
        if save.rank == 0:
            commit(save.scratch, save.head, save.share, save.ranks)
    except BaseException:
        shutil.rmtree(save.scratch, ignore_errors=True)
        raise


def save_in_background(saves: Sequence[Save]) -> BackgroundWrite:
    """Write what the ranks of this process have to write in a thread, from copies made here and now."""
    copied = [replace(save, share=save.share.copied()) for save in saves]

    def work() -> None:
        for save in copied:
            try:
                write_share(save.scratch, save.rank, save.share)
            except BaseException:
                say_failed(save.scratch, save.rank)
                raise
        first = copied[0]
        if first.rank == 0:
            try:
                wait_for_marks(first.scratch, first.ranks, _MARKS_TIMEOUT_SECONDS)
                commit(first.scratch, first.head, first.share, first.ranks)
            except BaseException:
                shutil.rmtree(first.scratch, ignore_errors=True)
                raise

    return BackgroundWrite(work)


def _common_options(optimizer: ShardOptimizer, everyone: Everyone) -> Any:
    """Return the options of the optimizers of all ranks, as `to_plain` writes them. Raises AutodistError where they
    differ: another mesh would not know whose to take."""
    own = optimizer.options()
    told = [text for text in everyone("" if own is None else json.dumps(_as_plain(own))) if text]
    if any(text != told[0] for text in told):
        raise AutodistError(
            "the optimizers of the ranks have other groups of parameters, or other options of them: give an optimizer "
            "function that makes the same groups for any parameters, empty ones too"
        )
    return json.loads(told[0]) if told else None


def _as_plain(options: OptimizerOptions) -> Any:
    fields = {name: getattr(options, name) for name in ("optimizer", "groups", "scheduler", "scheduler_state")}
    return {name: to_plain(value, f"{name} of the optimizer") for name, value in fields.items()}
