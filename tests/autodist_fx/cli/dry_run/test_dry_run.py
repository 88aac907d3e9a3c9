"""--dry-run of run and train: the plan, what would be started and what each rank would hold; nothing is started."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import autodist_fx as adx
from cost_model.format import bytes_text
from tests.support.checkpoint import save_tiny
from tests.support.command_line import fails, succeeds


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=1)


@pytest.fixture(autouse=True)
def _no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for command in ("run", "train"):
        monkeypatch.setattr(f"autodist_fx.cli.{command}.start_ranks", lambda *_, **__: pytest.fail("started ranks"))


def test_run(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("run", "--model", model, "--tp", 2, "--prompt", "w5 w6", "--max-new-tokens", 7, "--dry-run")
    said = succeeds(capsys, *given, "--device", "cpu")
    plan, facts = said.split("\nDry run: nothing is started, and no weights are read\n")
    assert plan.startswith("LlamaForCausalLM on tp=2 x pp=1 (2 ranks of cpu-gloo)")
    assert "2 ranks of this machine (tp=2 x pp=1), on cpu over Gloo" in facts
    assert f"each with: autodist-fx run --model {model} --tp 2 --prompt 'w5 w6' --max-new-tokens 7 --dev" in facts
    assert "1 prompt of 2 tokens, 7 new at most" in facts
    compiled = adx.compile(AutoModelForCausalLM.from_pretrained(model), tp=2, use_cache=True)
    ranks = [compiled.rank(rank, weights=True) for rank in range(2)]
    held = [bytes_text(sum(p.numel() * p.element_size() for p in rank.parameters())) for rank in ranks]
    assert re.findall(r"rank \d ([\d.]+ \w+)", facts) == held


def test_train(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "texts.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps({"text": f"w{row} w4 w5"}) + "\n" for row in range(3, 12)))
    given = ("train", "--model", model, "--data", data, "--out", out, "--batch-size", 4, "--epochs", 3)
    said = succeeds(capsys, *given, "--tp", 2, "--pp", 2, "--dry-run", "--device", "cpu")
    facts = said.split("\nDry run:")[1]
    assert "4 ranks of this machine (tp=2 x pp=2), on cpu" in facts
    assert "2 steps an epoch of 4 texts; 6 steps in all" in facts and "predicted at " in facts
    assert not out.exists()
    pinned = succeeds(capsys, *given, "--pp", 2, "--cut", "lm_head", "--dry-run", "--device", "cpu")
    assert "not predicted with --cut" in pinned


def test_one_rank_of_several_has_no_dry_run(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("run", "--model", model, "--tp", 2, "--prompt", "w5", "--dry-run", "--rank", 0)
    assert "this is one rank of it" in fails(capsys, *given)
