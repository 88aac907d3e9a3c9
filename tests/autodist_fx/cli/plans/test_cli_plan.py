"""`autodist-fx plan`: pins, cuts, devices, a plan file edited by hand, and the choice of a mesh."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autodist_fx.cli.main import main
from cost_model.partition_plan import PartitionPlan
from tests.support.encoders import tiny_config as encoder_config
from tests.support.models import tiny_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with nothing but config.json."""
    directory = tmp_path_factory.mktemp("model")
    tiny_config("llama", num_hidden_layers=3, architectures=["LlamaForCausalLM"]).save_pretrained(directory)
    return str(directory)


def test_pins_cuts_and_devices_are_in_the_plan_file_and_can_be_edited(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "plan.json")
    fixed = ["--pin", "*.q_proj=replicate", "--cut", "1", "--max-memory", "1GiB,2GiB", "--device-map", "a100=3GiB,h100"]
    assert main(["plan", "--model", model, "--tp", "2", "--pp", "2", *fixed, "--save", file]) == 0
    first = PartitionPlan.load(file)
    assert first.request.pin == (("*.q_proj", "replicate"),) and first.request.cuts == (1,)
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


@pytest.mark.parametrize("kind, class_name, sizes", [
    ("bert", "BertForMaskedLM", {"B": 1, "S": 128}),
    ("vit", "ViTForImageClassification", {"B": 1}),
])  # fmt: skip
def test_models_without_a_cache(
    kind: str, class_name: str, sizes: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Encoders are planned, proven and chosen a mesh for, at the lengths that they have; generating is refused."""
    encoder_config(kind, architectures=[class_name]).save_pretrained(tmp_path)
    file, model = str(tmp_path / "plan.json"), ["--model", str(tmp_path)]
    assert main(["plan", *model, "--tp", "2", "--pp", "2", "--save", file]) == 0
    assert dict(PartitionPlan.load(file).sizes) == sizes
    assert main(["verify", *model, "--plan", file]) == 0
    assert main(["graph-diff", *model, "--plan", file, "--rank", "3", "--json"]) == 0
    capsys.readouterr()
    assert main(["plan", *model, "--devices", "2", "--objective", "throughput", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["candidates"]
    for c in (c for c in found if c["pp"] == 1):
        in_flight = c["copies"] * c["sizes"]["B"] * sizes.get("S", 1)
        assert c["tokens_per_second"] == pytest.approx(in_flight / c["seconds"], rel=1e-9)
    assert main(["plan", *model, "--devices", "2"]) == 0
    assert ("tokens/s" if "S" in sizes else "samples/s") in capsys.readouterr().out


def test_a_step_of_a_model_with_its_own_cache_is_one_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_config("mamba", architectures=["MambaForCausalLM"]).save_pretrained(tmp_path)
    file = str(tmp_path / "plan.json")
    assert main(["plan", "--model", str(tmp_path), "--tp", "2", "--save", file]) == 0
    assert dict(PartitionPlan.load(file).sizes) == {"B": 1}
    capsys.readouterr()
    assert main(["explain", file, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 1


@pytest.mark.parametrize("sizes, said", [
    ({"Q": 3}, "sizes has no length 'Q': choose among B, S, P, E"),
    ({"B": 0}, "sizes: B is 0: give a whole number, 1 or more"),
    ({"P": -1}, "sizes: P is -1: give a whole number, 0 or more"),
    ({"S": 1.5}, "sizes: S is 1.5: give a whole number"),
])  # fmt: skip
def test_lengths_that_are_none(
    sizes: dict[str, Any], said: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "edited.json"
    file.write_text(json.dumps({"version": 3, "sizes": sizes}))
    assert main(["plan", "--model", model, "--from", str(file)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("options, said", [
    (["--sequences", "3"], "--sequences counts for --devices N --objective throughput alone"),
    (["--devices", "2", "--sequences", "3"], "--sequences counts for --devices N --objective throughput alone"),
    (["--devices", "2", "--objective", "throughput", "--batch", "3"], "leave --batch out, or give --sequences"),
    (["--device-map", "a100", "--hardware", "h100"], "leave --hardware out"),
    (["--pp", "2", "--max-memory", "20KiB"], "on the fullest at best, and a device holds 20.0 KiB"),
])  # fmt: skip
def test_options_that_would_do_nothing_or_cannot_be(
    options: list[str], said: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", model, *options]) == 2
    assert said in capsys.readouterr().err
