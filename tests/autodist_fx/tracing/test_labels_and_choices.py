"""Labels that are no tokens', several sequences for one answer, and the losses of routers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

import autodist_fx as adx
from autodist_fx.errors import AutodistError
from autodist_fx.tracing import trace
from passes.ops.data_dependent import selected
from tests.support.encoders import output_error, text_batch, tiny_encoder
from tests.support.float64 import in_float64
from tests.support.models import padded_batch, relative_error, tiny_model
from tests.support.moe import tiny_moe_model
from tests.support.training.gradients import batch_of, check_gradients


@pytest.mark.drawn(2)
@pytest.mark.parametrize(
    "changes, labels",
    [
        ({}, torch.tensor([0, 3])),
        ({"num_labels": 1}, torch.tensor([0.5, -1.0], dtype=torch.float64)),
        ({"problem_type": "regression"}, torch.randn(2, 5, dtype=torch.float64)),
        ({"problem_type": "multi_label_classification"}, torch.tensor([[1.0, 0, 1, 0, 0]] * 2, dtype=torch.float64)),
    ],
    ids=["single label", "a number", "numbers", "multi-label"],
)
def test_labels_of_a_classifier(changes: dict[str, Any], labels: torch.Tensor) -> None:
    model = tiny_encoder("BertForSequenceClassification", "bert", **changes)
    check_gradients(model, {**text_batch(), "labels": labels}, (2, 2))


@pytest.mark.drawn(1)
@pytest.mark.parametrize("class_name", ["BertForMultipleChoice", "RobertaForMultipleChoice"])
def test_multiple_choice(class_name: str) -> None:
    model = tiny_encoder(class_name, class_name.partition("For")[0].lower())
    ids = torch.randint(5, 90, (2, 3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 1, -2:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([2, 0])}
    compiled = check_gradients(model, inputs, (2, 2))
    with torch.no_grad():
        for choices in (3, 4):
            given = {"input_ids": torch.cat([ids, ids[:, :1]], 1)[:, :choices].contiguous()}
            wanted = model(**given)
            assert wanted.logits.shape == (2, choices)
            assert output_error(compiled.simulate(**given), wanted) < 1e-9
    with pytest.raises(AutodistError, match=r"input_ids is \[2, 7\]: it should be \[sequences, choices, tokens\]"):
        compiled.simulate(input_ids=ids[:, 0].contiguous())


@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe"])
def test_losses_of_routers(family: str) -> None:
    with in_float64():
        model = tiny_moe_model(family)
        model.config.output_router_logits = True
        ids, mask = padded_batch()
        inputs = {"input_ids": ids, "labels": ids}
        compiled = check_gradients(model, inputs, (2, 2))
        with torch.no_grad():
            wanted, found = model(**inputs), compiled.simulate(**inputs)
            for name in ("loss", "aux_loss", "logits"):
                assert relative_error(found[name], wanted[name]) < 1e-9, name


@pytest.mark.drawn(1)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_loss_over_a_number_of_items(family: str) -> None:
    with in_float64():
        model = tiny_model(family)
        check_gradients(model, {**batch_of(), "num_items_in_batch": torch.tensor(23)}, (2, 2))
        compiled = adx.compile(model, tp=2)
        with torch.no_grad():
            for items in (7, torch.tensor(8), 9.5):
                wanted = model(**batch_of(), num_items_in_batch=items).loss
                found = compiled.simulate(**batch_of(), num_items_in_batch=items).loss
                assert relative_error(found, wanted) < 1e-9
        assert len(compiled.variants) <= 3  # a number is an input, and no graph of its own


def test_everything_frozen_has_no_gradients() -> None:
    model = tiny_encoder("BertForSequenceClassification", "bert").requires_grad_(False)
    with pytest.raises(AutodistError, match="loss depends on no parameter that wants a gradient"):
        adx.compile(model, tp=2, pp=2, train=True).gradients(**text_batch(), labels=torch.tensor([0, 1]))


class LossOfMarkedTokens(LlamaForCausalLM):
    """A model whose loss leaves padding out by a mask that it writes twice, as LLaVA's and Granite Speech's do."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        logits, seen = output.logits, attention_mask[:, 1:]
        chosen = logits[:, :-1][seen.to(logits.device) != 0]
        wanted = labels[:, 1:][seen.to(labels.device) != 0]
        loss = torch.nn.functional.cross_entropy(chosen.view(-1, chosen.shape[-1]), wanted.view(-1))
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def test_a_mask_that_is_written_twice_selects_as_many() -> None:
    with in_float64():
        model = LossOfMarkedTokens(tiny_model("llama").config).double().eval()
        ids, mask = padded_batch()
        check_gradients(model, {"input_ids": ids, "attention_mask": mask, "labels": ids}, (2, 2))


class LossOfTwoParts(LlamaForCausalLM):
    """A model that selects by a mask, changes the mask in place, and selects by it again."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        seen = attention_mask.clone()
        first = output.logits[seen != 0].square().sum()
        seen[:, 0] = 0
        return CausalLMOutputWithPast(loss=first + output.logits[seen != 0].sum(), logits=output.logits)


def test_a_mask_that_is_changed_in_between_selects_anew() -> None:
    with in_float64():
        model = LossOfTwoParts(tiny_model("llama").config).double().eval()
        ids, mask = padded_batch()
        check_gradients(model, {"input_ids": ids, "attention_mask": mask, "labels": ids}, (2, 2))


class LossOfDrawnTokens(LlamaForCausalLM):
    """A model that selects by two masks that are drawn alike, and differ."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        logits = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs).logits
        draws = [logits[torch.rand_like(attention_mask, dtype=logits.dtype) > 0.5].sum() for _ in range(2)]
        return CausalLMOutputWithPast(loss=draws[0] + draws[1], logits=logits)


def test_masks_that_are_drawn_are_two() -> None:
    model = LossOfDrawnTokens(tiny_model("llama").config).train()
    graph = trace(model, input_names=("input_ids", "attention_mask")).graph_module.graph
    assert sum(node.target is selected for node in graph.nodes) == 2
