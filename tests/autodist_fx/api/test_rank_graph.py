"""A rank's graph with its weights is a module like any other: it is pickled, saved, copied, compiled, interpreted."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import autodist_fx as adx
from autodist_fx.errors import AutodistError
from autodist_fx.simulation.run_ranks import simulate
from tests.support.models import padded_batch, relative_error, tiny_config, tiny_model

IDS, MASK = padded_batch()
GIVEN = {"input_ids": IDS, "attention_mask": MASK}


def saved_and_loaded(module: torch.nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda graph: graph,
    "pickle": lambda graph: pickle.loads(pickle.dumps(graph)),
    "torch.save": saved_and_loaded,
    "deepcopy": copy.deepcopy,
    "torch.compile": lambda graph: torch.compile(graph, backend="eager", fullgraph=True),
    "torch.export": lambda graph: torch.export.export(graph, (IDS, MASK)).module(),
    "fx.Interpreter": lambda graph: torch.fx.Interpreter(graph).run,
}


@torch.no_grad()
@pytest.mark.parametrize("family, tolerance", [("gpt2", 1e-9), ("llama", 1e-6)])
def test_a_mesh_of_one_rank(family: str, tolerance: float) -> None:
    model = tiny_model(family)
    wanted = model(**GIVEN).logits
    graph = adx.compile(model).rank(0, weights=True)
    model.lm_head.weight.mul_(2)  # its weights are its own
    for name, way in WAYS.items():
        assert relative_error(way(graph)(IDS, MASK)["logits"], wanted) < tolerance, name


@torch.no_grad()
@pytest.mark.parametrize("way", ["pickle", "torch.save", "deepcopy", "fx.Interpreter"])
def test_ranks_that_talk_to_each_other(way: str) -> None:
    model = tiny_model("gpt2")
    compiled = adx.compile(model, tp=2, pp=2)
    programs = [compiled.program(rank) for rank in range(4)]
    graphs = [WAYS[way](compiled.rank(rank, weights=True)) for rank in range(4)]
    if way == "fx.Interpreter":
        graphs = [lambda run=run, **inputs: run(*inputs.values()) for run in graphs]
    own = [replace(program, graph_module=graph) for program, graph in zip(programs, graphs, strict=True)]
    found = simulate(own, [GIVEN] * 4)[-1]["logits"]
    assert relative_error(found, model(**GIVEN).logits) < 1e-9
    assert all(p.is_meta for rank in range(4) for p in compiled.rank(rank).parameters())


def test_the_whole_graph_is_pickled_too() -> None:
    graph = adx.compile(tiny_model("gpt2"), tp=2).graph
    assert pickle.loads(pickle.dumps(graph)).code == graph.code


def test_weights_of_a_config() -> None:
    with pytest.raises(AutodistError, match=r"rank\(weights=True\) needs weights"):
        adx.compile(tiny_config("gpt2"), tp=2).rank(0, weights=True)
