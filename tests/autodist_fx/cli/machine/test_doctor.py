"""`autodist-fx doctor`: what is there, what is not, and the exit code."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from autodist_fx.cli.main import main


def test_what_is_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setenv("ADX_CACHE", "1")
    monkeypatch.setenv("ADX_HARDWARE", "h100")
    assert main(["doctor", "--json"]) == 0
    found = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert found["torch"]["said"] == importlib.metadata.version("torch")
    assert found["cpu"]["said"].startswith(f"{len(os.sched_getaffinity(0))} cores, ")
    assert (found["cuda:0"]["state"] == "ok") if torch.cuda.is_available() else (found["cuda"]["state"] == "not there")
    assert found["gloo"]["state"] == found["loopback"]["state"] == found["passes"]["state"] == "ok"
    assert found["hardware"]["said"] == "plans are predicted for h100; this machine was not measured"
    assert found["splits"]["said"].startswith(f"0 in {tmp_path}")


def test_what_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def without(name: str) -> str:
        if name in ("networkx", "peft"):
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "networkx: pip install networkx" in said and "peft: pip install 'autodist-fx[lora]'" in said
    assert "\x1b" not in said  # no colours where it is no terminal
