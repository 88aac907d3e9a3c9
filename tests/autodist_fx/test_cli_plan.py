"""`autodist-fx plan`: pins, cuts, devices, a plan file edited by hand, and the choice of a mesh."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_config

from autodist_fx.cli.main import main
from cost_model.plan import PartitionPlan


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with nothing but config.json."""
    directory = tmp_path_factory.mktemp("model")
    tiny_config("llama", num_hidden_layers=3, architectures=["LlamaForCausalLM"]).save_pretrained(directory)
    return str(directory)


def test_what_is_fixed_is_in_the_plan_and_can_be_edited(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "plan.json")
    fixed = ["--pin", "*.q_proj=replicate", "--cut", "1", "--max-memory", "1GiB,2GiB", "--device-map", "a100=3GiB,h100"]
    assert main(["plan", "--model", model, "--tp", "2", "--pp", "2", *fixed, "--save", file]) == 0
    first = PartitionPlan.load(file)
    assert first.request.pins == (("*.q_proj", "replicate"),) and first.request.cuts == (1,)
    assert first.request.max_memory == (2**30, 2**31)
    assert [(d.hardware, d.memory) for d in first.request.device_map] == [("a100", 3 * 2**30), ("h100", 80 * 10**9)]
    assert first.stages[0].layers[-1] == "model.layers.0"

    data: dict[str, Any] = json.loads(Path(file).read_text())
    data["mesh"] = {"tp": 2, "pp": 3}
    data["request"] = {"pins": {"*.k_proj": "row"}, "cuts": ["model.layers.1", "model.layers.2"]}
    edited = tmp_path / "edited.json"
    edited.write_text(json.dumps(data | {"hardware": "h100"}))
    assert main(["plan", "--model", model, "--from", str(edited), "--save", file]) == 0
    again = PartitionPlan.load(file)
    assert again.mesh.pp == 3 and [s.layers[-1] for s in again.stages][:2] == ["model.layers.0", "model.layers.1"]
    assert {op.role for op in again.ops if op.module.endswith("k_proj")} == {"row"}
    capsys.readouterr()

    edited.write_text(json.dumps(data | {"request": {"pin": {}}}))
    assert main(["plan", "--model", model, "--from", str(edited)]) == 2
    assert "request.pin: unknown field" in capsys.readouterr().err
    assert main(["plan", "--model", model, "--plan", file, "--pin", "q_proj=row"]) == 2
    assert "a plan is used as it is, and pin would change it" in capsys.readouterr().err


def test_choosing_a_mesh(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "best.json"
    assert main(["plan", "--model", model, "--devices", "2", "--hardware", "h100", "--save", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "LlamaForCausalLM on 2 h100, by latency; predicted at B=1, S=1, P=512"
    assert sum("chosen" in line for line in lines) == 1 and {line.split()[0] for line in lines[4:7]} == {"1", "2", "3"}
    assert str(PartitionPlan.load(file).mesh) == " ".join(lines[4].split()[1:4])
    assert main(["plan", "--model", model, "--devices", "2", "--objective", "throughput", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [c["tokens_per_second"] for c in found["candidates"]] == sorted(
        (c["tokens_per_second"] for c in found["candidates"]), reverse=True
    )
    assert main(["plan", "--model", model, "--devices", "2", "--tp", "2"]) == 2
    assert "leave out --tp" in capsys.readouterr().err
