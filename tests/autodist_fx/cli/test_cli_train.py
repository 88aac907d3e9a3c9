"""`autodist-fx train`: a curve in one process, stopped and resumed; over two ranks, under torchrun too; refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.checkpoint import save_tiny
from tests.support.command_line import fails, succeeds
from tests.support.processes import ENV, free_port


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    texts = [{"text": " ".join(f"w{3 + (7 * row + n) % 90}" for n in range(4 + row % 5))} for row in range(10)]
    answers = [{"prompt": f"w{row} w4", "completion": "w9 w10 w11"} for row in range(3, 9)]
    path.write_text("".join(json.dumps(line) + "\n" for line in texts + answers))
    return path


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


OPTIONS = (
    "--batch-size", 4, "--learning-rate", 0.01, "--lr-scheduler", "constant_with_warmup", "--warmup-steps", 2,
    "--save-steps", 2,
)  # fmt: skip


def test_a_run_is_resumed(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("train", "--model", model, "--data", data, *OPTIONS)
    told = succeeds(capsys, *given, "--epochs", 2, "--out", tmp_path / "whole")
    assert "8 steps; a step took " in told and " and was predicted to take " in told
    assert told.startswith("step 1/8: loss ") and "tokens/s" in told
    wanted = losses(tmp_path / "whole")
    assert len(wanted) == 8 and wanted[-1] < wanted[0]
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert AutoTokenizer.from_pretrained(tmp_path / "whole")("w5")["input_ids"] == [5]

    parts = (*given, "--out", tmp_path / "parts")
    succeeds(capsys, *parts, "--steps", 3)
    assert "holds a run already: go on with it by --resume" in fails(capsys, *parts)
    assert "rows a batch of the run" in fails(capsys, *parts, "--resume", "--steps", 5, "--batch-size", 5)
    assert "has taken 3 steps of 3" in fails(capsys, *parts, "--resume", "--steps", 3)
    succeeds(capsys, *parts, "--resume", "--steps", 5)
    assert losses(tmp_path / "parts") == wanted[:5]


def under_torchrun(capsys: pytest.CaptureFixture[str], *words: object) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    command = [*torchrun, str(free_port()), "-m", "autodist_fx.cli.main", *map(str, words)]
    done = subprocess.run(command, env=ENV, timeout=200, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("steps; a step took") == 1  # rank 0 alone speaks


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.one_for_each()
@pytest.mark.parametrize("start", [succeeds, under_torchrun], ids=["own launcher", "torchrun"])
@pytest.mark.parametrize("mesh", ["--tp", "--pp"])
def test_two_ranks_go_on_with_a_run_of_one(
    start: Callable[..., object],
    mesh: str,
    model: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ("train", "--model", model, "--data", data, *OPTIONS)
    succeeds(capsys, *given, "--steps", 4, "--out", tmp_path / "whole")
    succeeds(capsys, *given, "--steps", 2, "--out", tmp_path / "parts")
    start(
        capsys, *given, "--steps", 4, "--out", tmp_path / "parts", "--resume", mesh, 2, "--device", "cpu",
        "--timeout", 60,
    )  # fmt: skip
    pairs = zip(losses(tmp_path / "whole"), losses(tmp_path / "parts"), strict=True)
    assert all(abs(a - b) <= 1e-5 for a, b in pairs)
    AutoModelForCausalLM.from_pretrained(tmp_path / "parts")


def test_data_that_is_none(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "w3 w4"}\n{"words": 3}\n')
    (tmp_path / "b.jsonl").write_text("w3 w4\n")
    (tmp_path / "c.jsonl").write_text('{"text": "w3 w4"}\n')
    given = ("train", "--model", model, "--out", tmp_path / "out", "--data")
    assert "a.jsonl:2 is none of" in fails(capsys, *given, tmp_path / "a.jsonl")
    assert "holds a line that is no JSON" in fails(capsys, *given, tmp_path / "b.jsonl")
    assert "there are 1 texts, and a batch has 8" in fails(capsys, *given, tmp_path / "c.jsonl")
    assert "cannot read" in fails(capsys, *given, tmp_path / "d.jsonl")
    assert "there is no run in" in fails(capsys, *given, tmp_path / "c.jsonl", "--resume")
