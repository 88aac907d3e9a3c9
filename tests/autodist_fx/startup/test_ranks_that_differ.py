"""Ranks that are not started alike: every rank says which rank differs in what, within seconds of their meeting."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaForCausalLM

import autodist_fx as adx
from autodist_fx.compiler.compilation import Compilation
from autodist_fx.compiler.compile import compile_for_generation
from autodist_fx.compiler.compile_options import CompileOptions
from autodist_fx.startup.facts import shared_weight_facts
from autodist_fx.weights.load import load_rank
from autodist_fx.weights.sources.module_source import ModuleSource
from cost_model.request.plan_options import PlanOptions
from tests.support.forked import on_processes
from tests.support.models import tiny_model

MOST_SECONDS = 5.0  # from their meeting until all know


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint, and others of the same names and sizes."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_model("llama", dtype=torch.float32, num_key_value_heads=2)
    model.save_pretrained(folder / "one")

    def change(name: str, edit: Callable[[dict[str, torch.Tensor]], object], **config: Any) -> None:
        model.save_pretrained(folder / name)
        tensors = load_file(folder / name / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        if config:
            AutoConfig.from_pretrained(folder / "one", **config).save_pretrained(folder / name)

    change("tuned", lambda tensors: [x.add_(1e-3) for x in tensors.values()])
    change("one projection", lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].mul_(1.001))
    change("one element of a norm", lambda tensors: tensors["model.norm.weight"][3].add_(1e-3))
    change("other epsilon", lambda tensors: None, rms_norm_eps=1e-3)
    (folder / "cut").mkdir()
    for file in (folder / "one").iterdir():
        (folder / "cut" / file.name).write_bytes(file.read_bytes())
    with (folder / "cut" / "model.safetensors").open("r+b") as weights:
        weights.truncate(weights.seek(0, 2) - 64)
    return folder


def load(folder: Path, name: str = "one", **changes: Any) -> Any:
    return adx.from_pretrained(folder / name, **{"tp": 2, "device": "cpu", "timeout": 60, **changes})


CASES: dict[str, tuple[Callable[[int, Path], Any], str]] = {
    "tp and pp": (lambda r, d: load(d, tp=2 - r, pp=1 + r), "mesh is tp=2, pp=1 on rank 0, and tp=1, pp=2 on rank 1"),
    "one alone": (lambda r, d: load(d, tp=2 - r), "mesh is tp=2, pp=1 on rank 0, and tp=1, pp=1 on rank 1"),
    "dtype": (lambda r, d: load(d, dtype=[None, "bfloat16"][r]), "dtype is auto on rank 0, and bfloat16 on rank 1"),
    "objective": (lambda r, d: load(d, objective=["shard", "latency"][r]), "objective is shard on rank 0, and latency"),
    "pin": (lambda r, d: load(d, pin=[None, {"*.mlp.*": "replicate"}][r]), "pin is nothing on rank 0, and (('*.mlp"),
    "memory": (lambda r, d: load(d, max_memory=[None, "1GB"][r]), "max_memory is nothing on rank 0, and (10000000"),
    "time-out": (lambda r, d: load(d, timeout=60 + r), "timeout is 60 s on rank 0, and 61 s on rank 1"),
    "device": (lambda r, d: load(d, device=["cpu", "cuda"][r]), "device is cpu on rank 0, and cuda on rank 1"),
    "cache": (lambda r, d: load(d, cache=[False, d / "kept"][r]), "cache is not in use on rank 0, and in use on"),
    "proof": (lambda r, d: load(d, verify=not r), "verify is True on rank 0, and False on rank 1"),
    "versions": (lambda r, d: load_as(r, d, "2.99"), "version of torch is 2."),
    "function": (lambda r, d: load(d) if r else in_memory(0), "the function called is to_distributed on rank 0"),
    "world size": (
        lambda r, d: load(d, tp=2 + r, rank=r, world_size=2 + r, **address()),
        "world size is 2 on rank 0, and 3 on rank 1; mesh is tp=2, pp=1 on rank 0, and tp=3, pp=1 on rank 1",
    ),
    "no such file": (lambda r, d: load(d, ["one", "none"][r]), "there is no file or directory"),
    "no such plan": (lambda r, d: load(d, plan=[None, "none.json"][r]), "cannot read the plan file none.json"),
    "cut short": (lambda r, d: load(d, ["one", "cut"][r]), "which is cut short: download or save it again"),
    "a fine-tune": (lambda r, d: load(d, ["one", "tuned"][r]), "the content of the weights is fingerprint"),
    "one tensor": (lambda r, d: load(d, ["one", "one projection"][r]), "the content of the weights is fingerprint"),
    "one element": (lambda r, d: load(d, ["one", "one element of a norm"][r]), "the content of the weights is finger"),
    "config": (lambda r, d: load(d, ["one", "other epsilon"][r]), "the config is sha256"),
    "in memory": (lambda r, d: in_memory(r), "the content of the weights is fingerprint"),
}
ERRORS = {"no such file": "CheckpointError", "no such plan": "PlanError", "cut short": "CheckpointError"}


@functools.cache
def compiled(rank: int) -> adx.CompiledModel:
    """Returns a model in memory, compiled before the ranks meet, of which rank 1 has one weight otherwise."""
    model = tiny_model("llama", dtype=torch.float32)
    model.model.layers[0].mlp.down_proj.weight.data[5, 7] += rank
    return adx.compile(model, tp=2)


def in_memory(rank: int) -> Any:
    return compiled(rank).to_distributed(device="cpu", timeout=60)


def load_as(rank: int, folder: Path, version: str) -> Any:
    if rank == 1:
        torch.__version__ = version
    return load(folder)


def address() -> dict[str, Any]:
    return {"master_addr": "127.0.0.1", "master_port": int(os.environ["MASTER_PORT"])}


def told(work: Callable[[], Any]) -> tuple[str, float]:
    """Returns what came of it, and the seconds until then."""
    began = time.monotonic()
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - began
    return "it went well", time.monotonic() - began


@pytest.mark.drawn(8)
@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_two_ranks(name: str, models: Path) -> None:
    work, text = CASES[name]
    if name in ("in memory", "function"):
        compiled(0), compiled(1)  # before the processes are forked
    answers = on_processes(2, lambda rank: told(lambda: work(rank, models)))
    for said, seconds in answers:
        assert said.startswith(ERRORS.get(name, "DisagreementError: the ranks do not agree: ")), said
        assert text in said and "\n" not in said
        assert seconds < MOST_SECONDS
    assert answers[0][0] == answers[1][0]


@pytest.mark.distributed
def test_four_ranks_of_which_one_has_another_checkpoint(models: Path) -> None:
    def work(rank: int) -> tuple[str, float]:
        return told(lambda: load(models, "tuned" if rank == 2 else "one", pp=2))

    answers = on_processes(4, work)
    assert {said for said, _ in answers} == {answers[0][0]} and max(seconds for _, seconds in answers) < MOST_SECONDS
    assert "on ranks 0, 1, 3, and fingerprint" in answers[0][0] and "on rank 2: start all ranks" in answers[0][0]


@pytest.mark.distributed
def test_after_a_disagreement_the_ranks_meet_again(models: Path) -> None:
    def work(rank: int) -> Any:
        with pytest.raises(adx.AutodistError, match="dtype is float32 on rank 0"):
            load(models, dtype=["float32", "float64"][rank])
        with pytest.raises(adx.AutodistError, match="the content of the weights"):
            load(models, ["one", "tuned"][rank])
        return load(models).generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False).tolist()

    expected = LlamaForCausalLM.from_pretrained(models / "one").generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False
    )
    assert on_processes(2, work) == [expected.tolist()] * 2


@pytest.fixture(scope="module")
def loaded() -> Iterator[tuple[Any, Any, Callable[[int], Any]]]:
    model = tiny_model("llama", num_attention_heads=6, num_key_value_heads=2, hidden_size=48)
    request = PlanOptions.from_keywords(tp=4, pp=2).resolve("cpu-gloo")
    compiled = compile_for_generation(model, Compilation, request, CompileOptions(verify=False))

    def of_rank(rank: int) -> Any:
        program = compiled.program(rank)
        load_rank(program, ModuleSource(model), buffers=compiled.buffers, base_model_prefix="model")
        return program

    yield model, compiled, of_rank


def test_slices_that_several_ranks_hold_are_compared(loaded: tuple[Any, Any, Callable[[int], Any]]) -> None:
    """Norms, and KV heads that two ranks have each: alike where the model is, and never where it is not."""
    model, compiled, of_rank = loaded
    facts = [shared_weight_facts(compiled.plan, of_rank(rank)) for rank in range(compiled.plan.mesh.size)]
    by_name: dict[str, set[str]] = {}
    for of in facts:
        for name, value in of.items():
            by_name.setdefault(name, set()).add(value)
    assert all(len(values) == 1 for values in by_name.values())
    assert any("k_proj" in name for name in by_name) and any("norm" in name for name in by_name)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[3, 5] += 1e-6
    again = shared_weight_facts(compiled.plan, of_rank(0))
    assert [name for name in again if again[name] != facts[0][name]] == [
        name for name in again if "layers.0.self_attn.k_proj" in name and "[0:" in name
    ]
