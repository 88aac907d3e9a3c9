"""An error of one rank ends what all of them wait for, and the communicator is as good as new for the next call."""

from __future__ import annotations

import functools
import time
from typing import Any

import pytest
import torch

from autodist_fx.errors import CheckpointError, RemoteRankError
from autodist_fx.runtime.comm.join_options import JoinOptions
from autodist_fx.runtime.comm.process_group import join
from autodist_fx.runtime.comm.remote_error import ErrorReport
from autodist_fx.runtime.generation.collective_call import CollectiveCalls
from autodist_fx.simulation.thread_communicator import ThreadWorld
from cost_model.mesh import Mesh
from tests.support.forked import on_processes

ROUNDS = 4


def a_round(communicator: Any, mesh: Mesh, fails: bool) -> float:
    """Does what a call does: sums over the tp group, and a message to the next stage."""
    rank = communicator.rank
    if fails:
        communicator.send(torch.ones(5), (rank + 1) % mesh.size, 9)  # and nobody will receive it
        raise IndexError(f"of rank {rank}")
    total = communicator.all_reduce(torch.ones(3), "tp") if mesh.tp > 1 else torch.ones(3)
    if mesh.pp > 1:
        communicator.send(total * (rank + 1), (rank + mesh.tp) % mesh.size, 3)
        total = communicator.recv((3,), torch.float32, "cpu", (rank - mesh.tp) % mesh.size, 3)
    return float(total[0])


def rounds(communicator: Any, mesh: Mesh) -> list[Any]:
    """One rank fails in every other round, in turns."""
    found: list[Any] = []
    calls = CollectiveCalls(communicator, mesh, communicator.rank, torch.device("cpu"))
    for number in range(2 * ROUNDS):
        began = time.monotonic()
        fails = number % 2 == 0 and number // 2 % mesh.size == communicator.rank
        try:
            call = functools.partial(a_round, communicator, mesh, fails)
            found.append(calls.run("round", functools.partial(dict, number=number), call))
        except IndexError as error:
            found.append(str(error))
        if time.monotonic() - began > 4:
            found[-1] = f"slow: {found[-1]}"
    return found


def expected(rank: int, mesh: Mesh) -> list[Any]:
    right = (mesh.tp if mesh.tp > 1 else 1) * ((rank - mesh.tp) % mesh.size + 1 if mesh.pp > 1 else 1)
    return [x for n in range(ROUNDS) for x in (f"of rank {n % mesh.size}", float(right))]


MESHES = [Mesh(tp=2), Mesh(pp=3), Mesh(tp=2, pp=2)]


@pytest.mark.distributed
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_over_processes(mesh: Mesh) -> None:
    def work(rank: int) -> list[Any]:
        return rounds(join(mesh, JoinOptions(device="cpu", timeout=30)).communicator, mesh)

    assert on_processes(mesh.size, work) == [expected(rank, mesh) for rank in range(mesh.size)]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_over_threads(mesh: Mesh) -> None:
    found = ThreadWorld(mesh).run(lambda rank, communicator: rounds(communicator, mesh))
    assert found == [expected(rank, mesh) for rank in range(mesh.size)]


class OwnError(Exception):
    def __init__(self, number: int) -> None:
        super().__init__(f"number {number}")


ERRORS = [KeyError("a key"), ValueError(), OSError(2, "No such file"), CheckpointError("lost"), KeyError(7)]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_the_same_class_and_text(error: Exception) -> None:
    error.add_note("a note")
    again = ErrorReport.from_text(ErrorReport.of(3, error).to_text()).error()
    assert type(again) is type(error) and str(again) == str(error)
    assert again.__notes__ == ["a note", "raised on rank 3"]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OwnError(3), "OwnError: number 3"),  # takes other arguments than its text
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), "UnicodeDecodeError: 'utf-8' codec"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),  # ends the rank where it was raised alone
    ],
)
def test_what_cannot_be_made_again(error: BaseException, text: str) -> None:
    again = ErrorReport.from_text(ErrorReport.of(0, error).to_text()).error()
    assert type(again) is RemoteRankError and str(again).startswith(text)
