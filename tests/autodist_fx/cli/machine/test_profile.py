"""`autodist-fx profile`: of a config alone, measured and predicted; with its only rank in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autodist_fx.cli.machine import profile
from autodist_fx.cli.main import main
from autodist_fx.report.profile import Profile


def test_a_config_alone(
    config_only: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(profile, "launch_local", lambda command, ranks: main(command[3:]))
    kept = tmp_path / "profile.json"
    asked = ["--model", str(config_only), "--seq", "4", "--new-tokens", "3"]
    assert main(["profile", *asked, "--save", str(kept), "--json"]) == 0
    found = Profile.load(kept)
    assert json.loads(capsys.readouterr().out)["model"] == found.model
    assert [phase.phase for phase in found.phases] == ["forward", "prefill", "decode"]
    for phase in found.phases:
        (rank,) = phase.ranks
        assert phase.predicted and 0 < rank.ops <= phase.timed_seconds and not rank.moving
        products = [op for op in phase.ops if op.kind == "linear"]
        assert products and all(op.predicted and op.seconds for op in products)
    assert "weights drawn" in found.about
