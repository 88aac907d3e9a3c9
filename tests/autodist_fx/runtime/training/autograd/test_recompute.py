"""Layers that run again in their backward pass: the same numbers, and what autograd saves of them is not kept."""

from __future__ import annotations

import pytest
import torch

import autodist_fx as adx
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.training.autograd.recompute import layers_of, with_recomputed_layers
from passes.ops.comm import using
from tests.support.float64 import in_float64
from tests.support.models import tiny_model
from tests.support.training.families import task
from tests.support.training.gradients import compiled_for_training
from tests.support.training.live_bytes import LiveBytes
from tests.support.training.one_process import adamw, check_training, text, windows

MESHES = [
    {"tp": 2, "pp": 2, "schedule": "1f1b"},
    {"tp": 2, "dp": 2, "zero_stage": 1},
    {"pp": 2, "schedule": "interleaved_zero_bubble", "stages_per_rank": 1},
    {"tp": 2, "pp": 2, "schedule": "gpipe"},
]


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "-".join(map(str, mesh.values())))
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "mixtral", "bert"])
@pytest.mark.drawn(2)
def test_the_numbers_are_those_of_one_process(family: str, mesh: dict[str, object]) -> None:
    with in_float64():
        model, steps, count = task(family, 2, 2)
        check_training(model, steps, count, {**mesh, "recompute": "layers"})


def test_dropout_draws_the_same_again() -> None:
    with in_float64():
        model, found = tiny_model("gpt2", n_layer=1, attn_pdrop=0.2, resid_pdrop=0.1), []
        for recompute in ("none", "layers"):
            engine = adx.train(model, tp=2, simulate=True, optimizer=adamw, seed=3, recompute=recompute)
            engine.step(windows(1)[0])
            found.append(engine.gather().parameters)
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_layers_are_the_models_and_only_their_inputs_are_kept() -> None:
    layers = 3
    model, batch = tiny_model("llama", torch.float32, num_hidden_layers=layers), text(4, 16, 0)
    compiled = compiled_for_training(model, batch, (1, 1), verify=False)
    wanted = compiled.gradients(**batch)  # loads the weights
    plain = compiled.main.programs[0].graph_module
    assert len(layers_of(plain)) == layers
    again = with_recomputed_layers(plain)
    kept = []
    for graph in (plain, again):
        with LiveBytes() as live, using(Alone()):
            loss = graph(**batch)["loss"]
            kept.append(live.now)
            named = dict(plain.named_parameters())
            found = torch.autograd.grad(loss, list(named.values()))
        for (path, _), gradient in zip(named.items(), found, strict=True):
            assert torch.equal(gradient, wanted[compiled.main.programs[0].param_shards[path].source])
        kept.append(live.most)
    hidden = batch["input_ids"].numel() * model.config.hidden_size * 4
    assert kept[2] < kept[0] - layers * 8 * hidden  # behind the forward pass
    assert kept[3] < kept[1] - (layers - 1) * 6 * hidden  # at most


def test_other_words_are_refused() -> None:
    for wrong in ("all", True):
        with pytest.raises(AutodistError, match=r"recompute is .*: give 'none', to keep .*; 'layers', to compute"):
            adx.train(tiny_model("llama"), simulate=True, recompute=wrong)


class Alone:
    """A communicator of nobody: one rank's graph has no comm nodes."""
