"""ZeRO's first stage and float32 weights beside bfloat16 ones: held once over the replicas, the same numbers."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import autodist_fx as adx
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.training.optimizer import MASTER
from autodist_fx.runtime.training.state_pieces import flat_boxes
from tests.support.float64 import in_float64
from tests.support.models import tiny_model
from tests.support.training.one_process import NO_DROPOUT, adamw, check_training, next_tokens, text, windows

fused = functools.partial(torch.optim.AdamW, lr=1e-2, fused=True)


def by_shape(named: list[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
    """Has no weight decay for what is no matrix, as many recipes have it, and a state before the first step."""
    parameters = [p for _, p in named] if isinstance(named[0], tuple) else list(named)
    matrices, others = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]
    return torch.optim.Adagrad([{"params": matrices, "weight_decay": 0.1}, {"params": others}], lr=1e-2)


@pytest.mark.parametrize(
    "mesh",
    [
        {"dp": 2}, {"dp": 3, "optimizer": by_shape}, {"dp": 2, "tp": 2, "pp": 2},
        {"dp": 2, "pp": 2, "schedule": "interleaved_1f1b", "optimizer": fused},
    ],
    ids=["dp", "groups", "tp-pp-dp", "interleaved"],
)  # fmt: skip
@pytest.mark.drawn(2)
def test_the_numbers_are_those_of_one_process(mesh: dict[str, Any]) -> None:
    with in_float64():
        optimizer = mesh.pop("optimizer", adamw)
        model = tiny_model("gpt2", **NO_DROPOUT)  # its embedding is tied
        check_training(model, windows(3), next_tokens, {**mesh, "zero_stage": 1}, optimizer=optimizer)


@pytest.mark.one_for_each()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_replica_keeps_its_part(dtype: torch.dtype) -> None:
    model, batch = tiny_model("llama", dtype), text(4, 9, 0)
    kept = []
    for zero_stage in (0, 1):
        engine = adx.train(model, dp=4, simulate=True, zero_stage=zero_stage)
        engine.step(batch)
        kept.append(engine.optimizer_bytes())
    whole = sum(p.numel() for p in model.parameters()) * (8 if dtype is torch.float32 else 12)
    assert all(whole <= nbytes <= 1.01 * whole for nbytes in kept[0])
    assert all(nbytes <= (1 / 4 + 0.05) * kept[0][0] for nbytes in kept[1]), kept


def test_float32_weights_beside_bfloat16_ones() -> None:
    """One process that keeps float32 weights by hand is the truth. Steps of a thousandth of what a bfloat16 can tell
    apart add up, and two meshes have the same bits."""
    model, batches = tiny_model("llama", torch.bfloat16, num_hidden_layers=1), [text(4, 9, seed) for seed in range(3)]
    optimizer = functools.partial(torch.optim.SGD, lr=1e-4, momentum=0.9)
    truth = copy.deepcopy(model).train()
    masters = {name: torch.nn.Parameter(p.detach().float()) for name, p in truth.named_parameters()}
    made = optimizer(masters.values())
    for batch in batches:
        truth.zero_grad()
        truth(**batch).loss.backward()
        for name, p in truth.named_parameters():
            masters[name].grad = p.grad.float()
        made.step()
        with torch.no_grad():
            for name, p in truth.named_parameters():
                p.copy_(masters[name])
    states = []
    for mesh in ({"dp": 1}, {"pp": 2, "zero_stage": 1}, {"dp": 2, "zero_stage": 1}):
        engine = adx.train(model, simulate=True, optimizer=optimizer, microbatches=2 // mesh.get("dp", 1), **mesh)
        for batch in batches:
            engine.step(batch)
        states.append(engine.gather())
    first = states[0]
    for name, master in masters.items():
        moved = master.detach() - model.get_parameter(name).detach().float()
        got = first.optimizer[name][MASTER]
        assert got.dtype == torch.float32 and first.parameters[name].dtype == torch.bfloat16
        assert (got - master.detach()).norm() <= 0.05 * moved.norm(), name  # the gradients are bfloat16's
        assert torch.equal(got.bfloat16(), first.parameters[name])
        for other in states[1:]:
            assert torch.equal(other.optimizer[name][MASTER], got), name


def test_other_stages_are_refused_by_name() -> None:
    for wrong in (2, True, "1"):
        with pytest.raises(AutodistError, match=r"zero_stage is .*: give 1, and the replicas hold optimizer states"):
            adx.train(tiny_model("llama"), dp=2, simulate=True, zero_stage=wrong)


def test_parts_of_slices_in_boxes() -> None:
    for shape in ((7,), (3, 4), (2, 3, 4), (3, 1, 2)):
        whole = torch.arange(math.prod(shape)).view(shape)
        for start in range(whole.numel()):
            for stop in range(start, whole.numel() + 1):
                found = [whole[tuple(slice(*side) for side in box)].flatten() for box in flat_boxes(shape, start, stop)]
                assert torch.cat([whole.new_empty(0), *found]).tolist() == list(range(start, stop))


@pytest.mark.drawn(2)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("mesh", "other"), [({"dp": 3}, {"tp": 2, "dp": 2}), ({"dp": 2, "pp": 2}, {"zero_stage": 0, "tp": 2})]
)
def test_a_run_goes_on_with_other_parts(
    mesh: dict[str, int], other: dict[str, int], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny_model("llama", dtype, num_hidden_layers=2, tie_word_embeddings=True)
    engine = adx.train(model, simulate=True, optimizer=adamw, **{"zero_stage": 1, **mesh})
    engine.step(text(6, 9, 0))
    engine.save(tmp_path)
    next_one = adx.train(model, simulate=True, optimizer=adamw, **{"zero_stage": 1, **other})
    next_one.step(text(6, 9, 1))
    next_one.load(tmp_path)
    was, now = engine.gather(), next_one.gather()
    assert was.optimizer.keys() == now.optimizer.keys()
    for name, parameter in was.parameters.items():
        assert torch.equal(parameter, now.parameters[name])
        assert was.optimizer[name].keys() == now.optimizer[name].keys()
        assert (MASTER in now.optimizer[name]) == (dtype is torch.bfloat16)
        for key, value in was.optimizer[name].items():
            assert torch.equal(value, now.optimizer[name][key]) and value.dtype == now.optimizer[name][key].dtype
