"""A process that is killed at any operation on files of a save leaves a whole checkpoint: the last or the new one."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import autodist_fx as adx
from autodist_fx.training.checkpoint.directory import latest
from autodist_fx.training.checkpoint.read import SavedRun
from tests.support.models import tiny_model
from tests.support.training.one_process import adamw, text

STRIDE = 3  # of 67 points; all of them have been seen to hold
OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")


def killed_at(number: int, directory: Path, work: Callable[[], None]) -> bool:
    """Runs `work` in a process that is killed at this operation on files in `directory`; False where it ended before.

    Operations are those that Python's audit tells of, and each flush to disk, after which alone a file is there.
    """
    child = os.fork()
    if child == 0:
        count = 0

        def operation(*_: Any) -> None:
            nonlocal count
            count += 1
            if count > number:
                os.kill(os.getpid(), signal.SIGKILL)

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            if event in OPERATIONS and str(directory) in str(arguments[0]):
                operation()

        os.fsync = operation  # the kernel has what was written: a process that is killed loses nothing of it
        sys.addaudithook(audit)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status != 0


def test_no_checkpoint_is_lost(tmp_path: Path) -> None:
    """Also where a save takes the place of one of the same step."""
    model = tiny_model("llama", torch.float32, num_hidden_layers=1, hidden_size=12, intermediate_size=8, vocab_size=16)
    engine = adx.train(model, tp=2, simulate=True, optimizer=adamw)
    wanted = []
    for step in (1, 2):
        engine.step(text(2, 9, step, vocab=16))
        wanted.append(engine.gather().parameters)
        if step == 1:
            engine.save(tmp_path)
    steps, points = [], 0
    for _ in range(2):  # the second time there is one of step 2
        number = 0
        while killed_at(number, tmp_path, lambda: engine.save(tmp_path)):
            saved = SavedRun(latest(tmp_path))
            saved.check_files((0,), 1)
            saved.close()
            steps.append(saved.head.step)
            number += STRIDE
            points += 1
        assert engine.load(tmp_path).step == 2
        assert all(torch.equal(x, wanted[1][name]) for name, x in engine.gather().parameters.items())
    assert steps == sorted(steps) and steps[0] == 1 and steps[-1] == 2
    assert points >= 20, points
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert not left or len(left) == 1, left
