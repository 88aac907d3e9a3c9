"""`autodist-fx plan --train`: the table, the schedule, the page, JSON, and options that do not go together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autodist_fx.cli.main import main
from cost_model.partition_plan import PartitionPlan
from tests.support.models import tiny_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with nothing but config.json."""
    directory = tmp_path_factory.mktemp("model")
    tiny_config("llama", num_hidden_layers=4, architectures=["LlamaForCausalLM"]).save_pretrained(directory)
    return str(directory)


def test_what_is_printed_and_written(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, file = tmp_path / "step.html", tmp_path / "plan.json"
    asked = ["plan", "--model", model, "--train", "--devices", "2", "--pp", "2", "--global-batch", "8", "--seq", "16"]
    assert main([*asked, "--schedule", "1f1b", "--html", str(page), "--save", str(file)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("LlamaForCausalLM, trained on 2 cpu-gloo with 8 sequences a step; predicted at S=16\n")
    assert sum("chosen" in line for line in out.splitlines()) == 1
    rows = [line for line in out.splitlines() if line.startswith("rank ")]
    assert len(rows) == 2 and rows[0].split()[2].startswith("F0") and rows[1].split()[2].startswith(".")
    assert "One training step over ranks" in page.read_text() and PartitionPlan.load(file).mesh.pp == 2

    assert main([*asked, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    best = data["candidates"][0]
    assert (best["tp"], best["pp"], best["dp"]) == (1, 2, 1) and best["microbatches"] * best["rows"] == 8
    assert best["memory_bytes"] == max(sum(rank.values()) for rank in best["memory"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--train"], "--train needs --global-batch N"),
        (["--train", "--global-batch", "8", "--tp", "2"], "--train needs --devices N, or all of --tp, --pp and --dp"),
        (["--dp", "2"], "--dp is of --train"),
        (["--train", "--global-batch", "8", "--devices", "2", "--past", "4"], "leave out --past"),
    ],
)
def test_options_that_do_not_go_together(
    model: str, given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", model, *given]) == 2
    assert said in capsys.readouterr().err
