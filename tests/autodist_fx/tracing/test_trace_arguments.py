"""Arguments of `trace`: inputs, sizes, concrete_args; and what it refuses."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    MambaConfig,
)

from autodist_fx.errors import TracingError
from autodist_fx.tracing import Sizes, empty_model, trace
from autodist_fx.tracing.example_inputs import unmistakable_sizes
from tests.support.graphs.traced import padded_batch, tiny_config, tiny_model, with_weights


def test_example_inputs() -> None:
    model = tiny_model("qwen3").bfloat16()
    traced = trace(model, use_cache=True)
    inputs = traced.example_inputs(Sizes(batch=3, seq=5, past=7))
    assert tuple(inputs) == traced.input_names
    shapes = {name: tuple(value.shape) for name, value in inputs.items() if name != "past_key_values"}
    known = {"input_ids": (3, 5), "attention_mask": (3, 12), "position_ids": (3, 5), "cache_position": (5,)}
    taken = inspect.signature(model.forward).parameters  # transformers 5 asks the cache for positions
    assert shapes == {name: shape for name, shape in known.items() if name in taken}
    cache = inputs["past_key_values"]
    assert [tuple(layer.keys.shape) for layer in cache.layers] == 2 * [(3, 4, 7, 8)]
    assert {layer.values.dtype for layer in cache.layers} == {torch.bfloat16}
    assert cache.layers[0].keys.is_meta and cache.get_seq_length() == 7
    assert traced.example_inputs(Sizes(3, 5, 0))["past_key_values"].get_seq_length() == 0
    assert traced.example_inputs(Sizes(3, 5, 7))["past_key_values"] is not cache


def test_cache_shapes_are_what_the_model_writes() -> None:
    """Falcon with one shared KV head: nothing in its config is called num_key_value_heads."""
    config = tiny_config("falcon")
    cache = trace(config, use_cache=True).example_inputs(Sizes(2, 3, 4))["past_key_values"]
    assert tuple(cache.layers[1].keys.shape) == (2, 1, 4, 8)


def test_layer_kinds() -> None:
    assert trace(tiny_config("llama")).layer_kinds == ()
    assert trace(tiny_config("llama"), use_cache=True).layer_kinds == ("full", "full")
    assert trace(tiny_config("gemma2"), use_cache=True).layer_kinds == ("sliding:5", "full")


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@torch.no_grad()
def test_embeddings_positions_and_labels_as_inputs(model_type: str) -> None:
    model = tiny_model(model_type)
    names = ("inputs_embeds", "attention_mask", "position_ids", "labels")
    traced = trace(model, input_names=names)
    assert set(traced.input_names) == set(names)
    ids, mask = padded_batch(2, 9)
    inputs = {
        "inputs_embeds": model.get_input_embeddings()(ids),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        "labels": ids,
    }
    got, expected = with_weights(traced, model)(**inputs), model(**inputs, use_cache=False)
    assert torch.equal(got["logits"], expected.logits) and torch.equal(got["loss"], expected.loss)


@torch.no_grad()
def test_concrete_args() -> None:
    model = tiny_model("llama")
    ids, mask = padded_batch(2, 9)
    logits = with_weights(trace(model, concrete_args={"logits_to_keep": 1}), model)(ids, mask)["logits"]
    assert torch.equal(logits, model(ids, mask, logits_to_keep=1).logits)


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
@torch.no_grad()
def test_rotary_embeddings_that_change_with_the_length(rope_type: str) -> None:
    """The choice of frequencies by length is the graph's to make at each call, not the tracer's once."""
    scaling = {"rope_type": rope_type, "factor": 4.0, "original_max_position_embeddings": 8}
    if rope_type == "longrope":
        scaling |= {"short_factor": [1.0] * 4, "long_factor": [2.0 + i for i in range(4)]}
    config = tiny_config("llama", rope_scaling=scaling, max_position_embeddings=8)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    graph_module = with_weights(trace(model), model)
    for seq in (6, 15, 6):
        ids, mask = padded_batch(2, seq)
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        assert torch.equal(graph_module(ids, mask)["logits"], expected)


def test_flash_attention_is_traced_as_sdpa() -> None:
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    targets = {node.target for node in trace(model).graph_module.graph.nodes}
    assert torch.nn.functional.scaled_dot_product_attention in targets
    assert model.config._attn_implementation == "flash_attention_2"


def test_unmistakable_sizes() -> None:
    model = empty_model(tiny_config("llama", hidden_size=5 * 7 * 16, head_dim=35, num_attention_heads=16))
    sizes = unmistakable_sizes(model)
    made_of = (sizes.batch, sizes.seq, sizes.past, sizes.seq + sizes.past)
    assert len(set(made_of)) == 4
    assert all(dim % size for parameter in model.parameters() for dim in parameter.shape for size in made_of)
    assert not {5, 7} & set(made_of)


def test_two_choices_of_sizes_have_none_in_common() -> None:
    model = empty_model(tiny_config("llama"))
    first = unmistakable_sizes(model)
    second = unmistakable_sizes(model, other_than=first)
    assert not {first.batch, first.seq, first.past} & {second.batch, second.seq, second.past}


@torch.no_grad()
def test_python_may_look_at_sizes_that_are_the_same_for_all_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def forward(self: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, object]:
        x = self.model.embed_tokens(input_ids) + self.model.norm.weight
        seen.append((int(x.shape[-1]), math.ceil(x.shape[2] / 10), [0] * x.size(-1)))
        int(x.shape[1] if self.looks_at_the_length else 1)
        return {"y": x}

    model = empty_model(tiny_config("llama"))
    monkeypatch.setattr(type(model), "forward", forward)
    model.looks_at_the_length = False
    graph = trace(model, input_names=["input_ids"]).graph_module.graph
    assert seen[-1] == (64, 7, [0] * 64)
    assert [node.target for node in graph.nodes if node.op == "get_attr"] == ["model.norm.weight"]  # nothing of a look
    model.looks_at_the_length = True
    with pytest.raises(TracingError, match="follows the inputs"):
        trace(model, input_names=["input_ids"])


def test_a_condition_on_the_ids_is_not_decided_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """An assertion passes: XLM's classes, in families/test_encoders."""

    def forward(self: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, object]:
        return {"y": self.model.embed_tokens(input_ids)} if input_ids.max().item() < 64 else {}

    model = empty_model(tiny_config("llama"))
    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(TracingError, match="cannot be used as inputs to control flow"):
        trace(model, input_names=["input_ids"])


def test_wrong_requests() -> None:
    with pytest.raises(TracingError, match=r"forward takes no pixel_values: choose input_names among input_ids"):
        trace(tiny_config("llama"), input_names=["input_ids", "pixel_values"])
    with pytest.raises(TracingError, match="leave it out of concrete_args"):
        trace(tiny_config("llama"), concrete_args={"beams": 2})
    with pytest.raises(TracingError, match="trace with use_cache=False"):
        trace(MambaConfig(num_hidden_layers=1, hidden_size=32, vocab_size=64), use_cache=True)


def test_sizes_are_values() -> None:
    assert replace(Sizes(1, 2, 3), seq=4) == Sizes(1, 4, 3)
