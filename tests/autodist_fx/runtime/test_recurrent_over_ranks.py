"""Models whose states are in a cache of their own, generating; over several processes: tests/distributed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Lfm2Config, Lfm2ForCausalLM

import autodist_fx as adx
from autodist_fx.calls.cache_names import CACHE_FIELD
from autodist_fx.errors import AutodistError
from cost_model.mesh import Mesh
from tests.support.models import randomized
from tests.support.ranks import on_ranks
from tests.support.state_space import state_space_model

CONFIG = Lfm2Config(
    vocab_size=61, hidden_size=24, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3,
    intermediate_size=31, layer_types=["conv", "full_attention", "conv"], pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
IDS = torch.tensor([[9, 10, 11, 12, 13], [0, 0, 14, 15, 16]])


@pytest.mark.parametrize("options", ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2, "do_sample": True}))
def test_beams_take_their_states_along(options: dict[str, Any], tmp_path: Path) -> None:
    """The truth is the model without a cache: its own cannot reorder beams in transformers 4.57.6 (IndexError)."""
    model = randomized(Lfm2ForCausalLM(CONFIG).eval())
    model.save_pretrained(tmp_path)
    split = adx.from_pretrained(tmp_path, tp=1, device="cpu")
    given = {"input_ids": IDS, "attention_mask": (IDS != 0).long(), "max_new_tokens": 8, **options}
    tokens = []
    for each, use_cache in ((model, False), (split, True)):
        torch.manual_seed(3)
        tokens.append(each.generate(**given, use_cache=use_cache).tolist())
    assert tokens[0] == tokens[1]


@torch.no_grad()
def test_beams_of_states_that_have_their_layers_in_front() -> None:
    """The truth is the model without a cache: transformers 4.57.6 does not reorder Mamba-2's, and answers otherwise."""
    model, ids = state_space_model("mamba2"), IDS[:1]
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    wanted = model.generate(ids, **options, use_cache=False).tolist()
    assert on_ranks(model, Mesh(tp=2), lambda split: split.generate(ids, **options).tolist()) == [wanted] * 2


@torch.no_grad()
def test_beams_of_a_model_whose_step_mixes_rows_are_refused() -> None:
    """RWKV's step broadcasts [batch, hidden] with [batch, 1, hidden]: a row's tokens follow from its neighbours, too,
    which greedily are those of transformers' own generate. With beams transformers refuses."""
    model, options = state_space_model("rwkv"), {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    wanted = model.generate(IDS, **options).tolist()

    def both(split: Any) -> Any:
        with pytest.raises(AutodistError, match=r"mixes the rows of a batch \(modeling_rwkv.py:\d+\)"):
            split.generate(IDS, **options, num_beams=2)
        return split.generate(IDS, **options).tolist()

    assert on_ranks(model, Mesh(pp=2), both) == [wanted] * 2


@pytest.mark.drawn(1)
@torch.no_grad()
@pytest.mark.parametrize("family", ["mamba", "lfm2"])
def test_prompts_shorter_than_the_convolution(family: str) -> None:
    """Prompts of one token and of two: the state begins with zeros. The truth is transformers' own generate, which from
    5 on equals the model without a cache (4.57's states of such prompts do not)."""
    lfm2 = Lfm2Config(**{**CONFIG.to_dict(), "conv_L_cache": 5})
    model = state_space_model("mamba") if family == "mamba" else randomized(Lfm2ForCausalLM(lfm2).double().eval())
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    prompts = IDS[:1, :1], IDS[:1, :2]
    wanted = [model.generate(ids, **options).tolist() for ids in prompts]
    found = on_ranks(model, Mesh(pp=2), lambda split: [split.generate(x, **options).tolist() for x in prompts])
    assert found == [wanted] * 2


def test_several_tokens_after_the_prompt_are_refused(tmp_path: Path) -> None:
    Lfm2ForCausalLM(CONFIG).save_pretrained(tmp_path)
    split = adx.from_pretrained(tmp_path, tp=1, device="cpu")
    cache = split(IDS, use_cache=True).past_key_values
    with pytest.raises(AutodistError, match="one token at a time after its prompt; got 5"):
        split(IDS, past_key_values=cache)
    with pytest.raises(AutodistError, match="cannot be cropped"):
        cache.crop(2)


@torch.no_grad()
def test_what_the_graphs_with_states_do_not_take_is_refused_by_simulate() -> None:
    compiled = adx.compile(state_space_model("mamba"), tp=2, use_cache=True, verify=False)
    for further in ({"output_hidden_states": True}, {"labels": IDS}):
        with pytest.raises(AutodistError, match=f"takes no {next(iter(further))}: call it with use_cache=False"):
            compiled.simulate(IDS, use_cache=True, **further)
    assert list(compiled.simulate(IDS, output_hidden_states=False, use_cache=True)) == ["logits", CACHE_FIELD]
