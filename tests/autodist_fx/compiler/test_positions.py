"""Positions of rows that are padded on the left: those that generate gives the model, or the model's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GitConfig, GitForCausalLM, PreTrainedModel

import autodist_fx as adx
from autodist_fx.compiler.generation_traits import follow_mask, last_logits_only
from autodist_fx.runtime.comm.process_group import JoinedRank
from autodist_fx.simulation.thread_communicator import ThreadWorld
from autodist_fx.startup.from_artifact import share
from cost_model.mesh import Mesh
from tests.support.models import randomized, tiny_model
from tests.support.ranks import on_ranks

IDS = torch.tensor([[0, 0, 0, 5, 9, 7], [11, 4, 8, 6, 3, 12]])
MASK = (IDS > 0).long()
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def git() -> PreTrainedModel:
    """Returns a GIT, whose own prepare_inputs_for_generation names no positions."""
    config = GitConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0,
        max_position_embeddings=64, vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                                                   "num_attention_heads": 2, "image_size": 8, "patch_size": 4},
    )  # fmt: skip
    model = randomized(GitForCausalLM(config).double().eval())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2.0 if parameter.dim() > 1 else 1.0  # so that the next token depends on those before
    return model


def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.mark.drawn(1)
@pytest.mark.parametrize("make", [git, llama])
def test_rows_padded_on_the_left(make: Any, tmp_path: Path) -> None:
    model = make()
    expected = model.generate(IDS, attention_mask=MASK, **GREEDY).tolist()
    unpadded = model.generate(IDS[:1, 3:], attention_mask=MASK[:1, 3:], **GREEDY)[0].tolist()
    follows = follow_mask(type(model))
    if make is llama or not follows:  # transformers 5's GIT shows each step images that are not there: its rows differ
        assert (expected[0][3:] == unpadded) == follows, "positions make no difference here"

    def tokens(split: Any) -> list[list[int]]:
        return split.generate(IDS, attention_mask=MASK, **GREEDY).tolist()

    assert on_ranks(model, Mesh(tp=2), tokens) == [expected] * 2

    compiled = adx.compile(model, tp=2, use_cache=True, concrete_args=last_logits_only(model))
    compiled.simulate(input_ids=IDS, attention_mask=MASK, use_cache=True)  # a prompt goes another way in git's code
    compiled.save(tmp_path / "saved")
    artifact = adx.load(tmp_path / "saved")

    def of_rank(rank: int, communicator: Any) -> list[list[int]]:
        return tokens(share(artifact, JoinedRank(artifact.mesh, rank, torch.device("cpu"), communicator)))

    assert ThreadWorld(artifact.mesh).run(of_rank) == [expected] * 2
