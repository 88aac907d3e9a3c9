"""compile(..., verbose=True) prints what each pass did: of the whole graph once, of each rank's."""

from __future__ import annotations

import pytest

import autodist_fx as adx
from passes.fx import node_meta
from tests.support.models import tiny_config


def test_each_ranks_passes_are_printed_and_the_whole_graphs_once(capsys: pytest.CaptureFixture[str]) -> None:
    compiled = adx.compile(tiny_config("gpt2", n_layer=1), tp=2, verbose=True)
    printed = capsys.readouterr().out
    assert printed.count("GPT2LMHeadModel, the whole graph\n") == 1
    assert [printed.count(f"rank {rank}\n") for rank in range(3)] == [1, 1, 0]
    assert printed.count("pass ") == 3
    (line,) = {line for line in printed.splitlines() if line.startswith("insert_collectives")}
    (record,) = (r for r in node_meta.history(compiled.rank(0)) if r.name == "insert_collectives")
    assert line.split()[1:] == [str(record.matches), str(record.inserted), str(record.removed)] and record.inserted > 0


def test_nothing_is_printed_unless_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    adx.compile(tiny_config("gpt2", n_layer=1), tp=2)
    assert capsys.readouterr().out == ""
