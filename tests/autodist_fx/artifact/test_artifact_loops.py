"""Loops over lengths in an artifact: graphs like all others, and refused like all others when they are damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import autodist_fx as adx
from autodist_fx.api.compiled_model import CompiledModel
from autodist_fx.artifact.manifest import ArtifactError
from tests.support.artifacts import renew_digests
from tests.support.decoding import IDS, decoded_artifact
from tests.support.state_space import state_space_model

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = "variants/whole/rank1.json"


@pytest.fixture(scope="module")
def mamba() -> CompiledModel:
    return adx.compile(state_space_model("mamba"), tp=2, use_cache=True)


@pytest.fixture(scope="module")
def saved(mamba: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("loops") / "saved"
    with torch.no_grad():
        mamba.simulate(input_ids=IDS)
    mamba.save(directory)
    return directory


_FRESH = """
import sys, torch
import autodist_fx as adx
from tests.support.decoding import decoded_artifact
before = {{name for name in sys.modules if "modeling_mamba" in name}}
with torch.no_grad():
    torch.save(decoded_artifact(adx.load({directory!r})), {found!r})
for module in [m for n, m in sys.modules.items() if "modeling_mamba" in n and n not in before]:
    raise SystemExit(f"{{module}} was imported")
"""


@torch.no_grad()
def test_a_fresh_process_computes_the_same_bit_for_bit(mamba: CompiledModel, saved: Path, tmp_path: Path) -> None:
    found = tmp_path / "found.pt"
    code = _FRESH.format(directory=str(saved), found=str(found))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    for after, then in zip(torch.load(found), decoded_artifact(mamba), strict=True):
        assert torch.equal(after, then)


@pytest.mark.drawn(1)
@pytest.mark.parametrize("family, changes", [("rwkv", {}), ("recurrent_gemma", {"attention_window_size": 32})])
@torch.no_grad()
def test_other_loops(family: str, changes: dict[str, int], tmp_path: Path) -> None:
    """One that writes into its output, and one that keeps its state on its module."""
    compiled = adx.compile(state_space_model(family, **changes), tp=2, use_cache=True)
    before = decoded_artifact(compiled)
    compiled.save(tmp_path / "saved")
    artifact = adx.load(tmp_path / "saved")
    artifact.verify()
    for after, then in zip(decoded_artifact(artifact), before, strict=True):
        assert torch.equal(after, then)


def test_a_loaded_graph_serializes_to_the_same_json(saved: Path) -> None:
    from autodist_fx.artifact.variant_format import LAYERS
    from passes.serialize.write_graph import graph_to_json

    for name in ("whole", "prompt"):
        program = adx.load(saved).program(0, name)
        written = json.loads((saved / f"variants/{name}/rank0.json").read_text())["graph"]
        assert json.loads(json.dumps(graph_to_json(program.graph_module, LAYERS)))["nodes"] == written["nodes"]


def _loop(program: dict[str, Any]) -> dict[str, Any]:
    nodes = program["graph"]["nodes"]
    return next(n["target"]["loop"] for n in nodes if isinstance(n["target"], dict))


def _body(program: dict[str, Any]) -> list[dict[str, Any]]:
    return _loop(program)["bodies"][0]["nodes"]


TENSOR = {"name": "w", "kind": "buffer", "dtype": "float32", "shape": [1]}
DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a function of no list": (lambda g: _body(g)[-2].update(op="call_function", target="os.system"), "not on the list"),
    "a method of no list": (lambda g: _body(g)[-2].update(op="call_method", target="__class__"), "not on the list"),
    "a name that is Python": (lambda g: _body(g)[0].update(name="x=open('run','w')"), "is no name"),
    "an argument from nowhere": (lambda g: _body(g)[-2].update(args=[{"node": "nobody"}]), "no node before it"),
    "no body": (lambda g: _loop(g).update(bodies=[]), "has no body"),
    "no bounds": (lambda g: _loop(g).pop("bounds"), "is no object of"),
    "another body": (lambda g: _body(g)[-1].update(args=[{"tuple": []}]), "does not give its variables"),
    "fewer arguments": (lambda g: _loop(g)["inputs"].pop(), "takes other arguments|does not give"),
    "it owns a stranger": (lambda g: _loop(g).update(own=["stranger"]), "does not give its variables"),
    "its name is Python": (lambda g: _loop(g).update(name="x()"), "is no name"),
    "its name is a keyword": (lambda g: _loop(g).update(name="lambda"), "may not be a name"),
    "a tensor": (lambda g: _loop(g)["results"].update(tensors=[TENSOR]), "reads a tensor"),
    "a layer": (lambda g: _loop(g)["results"].update(modules={"m": {"class": "nn.Linear"}}), "not on the list of lay"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_loop_is_refused(kind: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "artifact"
    shutil.copytree(saved, directory)
    change, said = DAMAGE[kind]
    program = json.loads((directory / PROGRAM).read_text())
    change(program)
    (directory / PROGRAM).write_text(json.dumps(program))
    renew_digests(directory)
    with pytest.raises(ArtifactError, match=said) as caught:
        adx.load(directory).program(1, "whole")
    assert PROGRAM in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_loop_that_looks_at_its_counter_is_refused_by_name() -> None:
    from passes.serialize.write_graph import GraphFormatError, graph_to_json
    from tests.support.graphs.loops import InPlaceScan, traced_loop

    module = traced_loop(InPlaceScan(), torch.rand(2, 7, 4))
    with pytest.raises(GraphFormatError, match=r"outlined_forward_\d+, a loop that cannot be saved .* \(TraceErr"):
        graph_to_json(module)


def test_a_list_that_a_loop_fills() -> None:
    from tests.support.graphs.loops import ListScan, traced_loop

    module = ListScan()
    module.block = 1
    graph_module = traced_loop(module, torch.rand(2, 7, 4))
    node = next(n for n in graph_module.graph.nodes if hasattr(n.target, "source"))
    node.target = node.target.source.graphs(node.args).function()
    graph_module.recompile()
    for length in (1, 2, 12):
        x = torch.rand(2, length, 4)
        for found, expected in zip(graph_module(x), module(x), strict=True):
            assert torch.equal(found, expected)
