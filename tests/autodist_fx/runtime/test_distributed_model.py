"""Models that do not generate, or have no graph with a cache, called over ranks as the whole model is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

import autodist_fx as adx
from autodist_fx.errors import AutodistError
from cost_model.mesh import Mesh
from tests.support.models import randomized, relative_error
from tests.support.ranks import on_ranks

IDS = torch.arange(2, 20).view(2, 9)
MASK = torch.ones_like(IDS).index_put((torch.tensor(0), torch.tensor(8)), torch.tensor(0))


def classifier() -> PreTrainedModel:
    config = AutoConfig.for_model(
        "bert", vocab_size=100, hidden_size=36, intermediate_size=50, num_hidden_layers=2, num_attention_heads=3,
        num_labels=3,
    )  # fmt: skip
    return randomized(AutoModelForSequenceClassification.from_config(config).double().eval())


@pytest.mark.drawn(1)
@pytest.mark.parametrize("mesh", (Mesh(tp=2), Mesh(pp=2)), ids=str)
def test_a_classifier_and_its_loss(mesh: Mesh) -> None:
    model = classifier()
    calls: list[dict[str, Any]] = [
        {"input_ids": IDS, "attention_mask": MASK},
        {"input_ids": IDS[:, :4]},
        {"input_ids": IDS, "attention_mask": MASK, "labels": torch.tensor([1, 2])},
    ]

    def work(split: Any) -> list[dict[str, torch.Tensor]]:
        assert not split.can_generate()
        with pytest.raises(AutodistError, match="BertForSequenceClassification does not generate: over ranks it is"):
            split.generate(IDS)
        return [dict(split(**call)) for call in calls]

    for found in on_ranks(model, mesh, work):
        for call, output in zip(calls, found, strict=True):
            with torch.no_grad():
                expected = model(**call)
            assert output.keys() == expected.keys()
            for name, value in expected.items():
                assert relative_error(output[name], value) <= 1e-9, (call.keys(), name)


def test_a_language_model_without_a_cache() -> None:
    """GPT-1 keeps none, so that transformers generates with the whole sequence at each step."""
    config = AutoConfig.for_model("openai-gpt", vocab_size=100, n_embd=36, n_layer=2, n_head=3)
    model = randomized(AutoModelForCausalLM.from_config(config).double().eval())

    def work(split: Any) -> torch.Tensor:
        with pytest.raises(AutodistError, match=r"OpenAIGPTLMHeadModel .* cache"):
            split.generate(IDS)
        with pytest.raises(AutodistError, match="runs without a cache"):
            split(IDS, use_cache=True)
        return split(IDS, attention_mask=MASK).logits

    with torch.no_grad():
        expected = model(IDS, attention_mask=MASK).logits
    assert all(relative_error(found, expected) <= 1e-9 for found in on_ranks(model, Mesh(tp=2), work))


def test_a_checkpoint_of_a_classifier_and_its_split_in_the_cache(tmp_path: Path) -> None:
    model = classifier()
    model.save_pretrained(tmp_path / "checkpoint")
    for _ in range(2):  # compiled, and out of the cache of splits
        split = adx.from_pretrained(tmp_path / "checkpoint", device="cpu", cache=tmp_path / "cache")
        with torch.no_grad():
            expected = model(IDS, attention_mask=MASK).logits
            assert relative_error(split(IDS, attention_mask=MASK).logits, expected) <= 1e-9
            assert relative_error(split(IDS).logits, model(IDS).logits) <= 1e-9
        with pytest.raises(AutodistError, match="BertForSequenceClassification"):
            split.generate(IDS)
