"""Steps of models with caches of their own that compute otherwise with fewer cached tokens: a graph for each way."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BambaForCausalLM

import autodist_fx as adx
from autodist_fx.errors import AutodistError
from cost_model.mesh import Mesh
from tests.support.models import relative_error
from tests.support.ranks import on_ranks
from tests.support.state_space import state_space_model

pytestmark = pytest.mark.slow
IDS = torch.randint(5, 50, (2, 12), generator=torch.Generator().manual_seed(0))


class Counting(BambaForCausalLM):
    """A hybrid that counts the last six places of its mask."""

    @functools.wraps(BambaForCausalLM.forward)  # with the same arguments, in each version of transformers
    def forward(self, *args, attention_mask=None, **kwargs):
        output = super().forward(*args, attention_mask=attention_mask, **kwargs)
        output.logits = output.logits * (1 + attention_mask[:, -6:].shape[-1])
        return output


def counting() -> Counting:
    plain = state_space_model("bamba")
    model = Counting(plain.config).double().eval()
    model.load_state_dict(plain.state_dict())
    return model


def decoded(split: Any, prompt: int) -> torch.Tensor:
    """The logits of each token behind a prompt, [batch, tokens, vocabulary]; one token at a time."""
    cache, logits = None, []
    for start, stop in [(0, prompt), *((at, at + 1) for at in range(prompt, IDS.shape[1]))]:
        inputs = {"input_ids": IDS[:, start:stop], "attention_mask": torch.ones(2, stop, dtype=torch.long)}
        step = split.simulate(**inputs, past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        logits.append(step.logits[:, -1:])
    return torch.cat(logits, 1)


def expected(model: Counting, prompt: int) -> torch.Tensor:
    """The same without a cache: all tokens so far at each."""
    stops = range(prompt, IDS.shape[1] + 1)
    asked = [(IDS[:, :n], torch.ones(2, n, dtype=torch.long)) for n in stops]
    return torch.cat([model(x, attention_mask=mask, use_cache=False).logits[:, -1:] for x, mask in asked], 1)


@pytest.mark.drawn(1)
@pytest.mark.parametrize("mesh", [(2, 1), (1, 2)], ids=["tp", "pp"])
@torch.no_grad()
def test_steps_before_and_behind_the_bound(mesh: tuple[int, int], tmp_path: Path) -> None:
    model = counting()
    compiled = adx.compile(model, tp=mesh[0], pp=mesh[1], use_cache=True)
    for prompt in (9, 3):
        assert relative_error(decoded(compiled, prompt), expected(model, prompt)) < 1e-6
    compiled.verify()
    assert sum(variant.traced.phase == "step" for variant in compiled.variants) == 2
    compiled.save(tmp_path / "both")
    loaded = adx.load(tmp_path / "both")
    for prompt in (3, 9):
        assert relative_error(decoded(loaded, prompt), expected(model, prompt)) < 1e-6


@torch.no_grad()
def test_an_artifact_refuses_steps_that_it_has_no_graph_of(tmp_path: Path) -> None:
    compiled = adx.compile(counting(), tp=2, use_cache=True)
    decoded(compiled, 9)
    compiled.simulate(input_ids=IDS[:, :3], attention_mask=torch.ones(2, 3, dtype=torch.long), past_key_values=None)
    compiled.save(tmp_path / "long")
    with pytest.raises(AutodistError, match=r"tokens cached: 3.*come out otherwise"):
        decoded(adx.load(tmp_path / "long"), 3)


@pytest.mark.drawn(1)
@pytest.mark.parametrize("mesh", [Mesh(tp=2), Mesh(pp=2)], ids=["tp", "pp"])
def test_generating_over_ranks(mesh: Mesh) -> None:
    """Prompts shorter than the bound are shorter than two chunks, too, where sizes are alike by chance."""
    model = counting()

    def tokens(split: Any) -> list[list[list[int]]]:
        asked = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        prompts = [(IDS[:, :n], torch.tensor([[0] + [1] * (n - 1), [1] * n])) for n in (3, 9, 4)]  # a row is padded
        return [split.generate(x, attention_mask=mask, **asked).tolist() for x, mask in prompts]

    found = on_ranks(model, mesh, tokens)
    with torch.no_grad():
        assert found == [tokens(model)] * 2
