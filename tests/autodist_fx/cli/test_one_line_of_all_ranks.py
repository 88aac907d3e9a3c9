"""An error that several ranks of one command raise is said once, by the rank that it comes from."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autodist_fx.cli.main import main
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.comm.join_options import JoinOptions
from autodist_fx.runtime.comm.launch import ONE_STDERR
from autodist_fx.runtime.comm.process_group import JoinedRank, join
from cost_model.mesh import Mesh
from tests.support.forked import on_processes


def failing(rank: int) -> tuple[None, dict[str, str]]:
    if rank == 1:
        raise AutodistError("no such\nmodel")
    return None, {}


WORK: dict[str, tuple[Callable[[JoinedRank], Any], str]] = {
    "one rank's": (lambda me: me.together(lambda: failing(me.rank)), "no such model"),
    "nobody's": (
        lambda me: me.together(lambda: (None, {"the model": "AB"[me.rank > 0]})),
        "the ranks do not agree: the model is A on rank 0, and B on ranks 1, 2: ",
    ),
}


@pytest.mark.distributed
@pytest.mark.parametrize("work, words", WORK.values(), ids=WORK)
@pytest.mark.parametrize("one_stderr", [True, False], ids=["one stderr", "terminals"])
def test_an_error_of_several_ranks(
    work: Callable[[JoinedRank], Any], words: str, one_stderr: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = tmp_path / "stderr"

    def rank(number: int) -> int:
        if one_stderr:
            os.environ[ONE_STDERR] = "1"
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        with open(2, "w", closefd=False) as stream:
            monkeypatch.setattr("sys.stderr", stream)
            joining = JoinOptions(device="cpu", timeout=30)
            monkeypatch.setattr("autodist_fx.cli.plans.show.run", lambda args: work(join(Mesh(tp=3), joining)))
            return main(["show", "a plan"])

    codes = on_processes(3, rank, seconds=30)
    lines = said.read_text().splitlines()
    assert lines[0].startswith(f"autodist-fx: error: {words}")
    if one_stderr:  # the others are ended by the rank that says it
        assert len(lines) == 1 and sorted(codes, key=str) == [2, None, None]
    else:
        assert sum(line.startswith(f"autodist-fx: error: {words}") for line in lines) >= 1 and 2 in codes
