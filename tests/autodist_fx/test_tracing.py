"""Traced graphs give what the model gives, for any sizes, and tracing leaves no trace on torch and transformers."""

from __future__ import annotations

import math
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    PretrainedConfig,
    PreTrainedModel,
    masking_utils,
    modeling_attn_mask_utils,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama import modeling_llama
from transformers.pytorch_utils import Conv1D
from transformers.utils import fx as hf_fx

from autodist_fx.errors import TracingError
from autodist_fx.tracing import Sizes, TracedModel, empty_model, meta_copy, trace, traced_model
from autodist_fx.tracing.example_inputs import unmistakable_sizes

TINY = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 8, "n_embd": 64, "n_layer": 2, "n_head": 4, "ffn_dim": 128,
    "word_embed_proj_dim": 64, "max_position_embeddings": 128, "sliding_window": 5,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = [
    "llama", "qwen2", "gpt2", "opt", "mistral", "qwen3", "phi3", "phi", "gpt_neox", "bloom", "falcon", "gemma2",
]  # fmt: skip


def tiny_config(model_type: str, **changes: object) -> PretrainedConfig:
    config = AutoConfig.for_model(model_type)
    for name, value in {**TINY, **changes}.items():
        read_only = isinstance(getattr(type(config), name, None), property)  # falcon's head_dim
        off = name == "sliding_window" and getattr(config, name, None) is None  # qwen2's and phi3's: left off
        if hasattr(config, name) and not read_only and not off:
            setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    return config


def tiny_model(model_type: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type, **changes)).eval()


def with_weights(traced: TracedModel, model: PreTrainedModel) -> torch.fx.GraphModule:
    missing = traced.graph_module.load_state_dict(model.state_dict(), strict=False, assign=True).missing_keys
    assert not missing
    return traced.graph_module


def padded_batch(batch: int, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and a mask, the first sequence padded on the left. (Eager takes another kernel where nothing is.)"""
    generator = torch.Generator().manual_seed(seq)
    ids = torch.randint(3, 250, (batch, seq), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return ids, mask


def signature(graph: torch.fx.Graph) -> list[tuple[object, ...]]:
    """A graph as plain values, to compare two of them."""
    return [(node.op, node.name, node.target, str(node.args), str(node.kwargs)) for node in graph.nodes]


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_graph_equals_eager_bit_for_bit(model_type: str) -> None:
    model = tiny_model(model_type)
    graph_module = with_weights(trace(model), model)
    for batch, seq in ((2, 9), (3, 14), (1, 4)):
        ids, mask = padded_batch(batch, seq)
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        assert torch.equal(graph_module(input_ids=ids, attention_mask=mask)["logits"], expected)


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_graph_with_cache_equals_eager_without(model_type: str) -> None:
    """Prefill, then token by token, past the sliding window where there is one."""
    model = tiny_model(model_type)
    traced = trace(model, use_cache=True)
    graph_module = with_weights(traced, model)
    ids, mask = padded_batch(3, 14)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    assert len(traced.layer_kinds) == len(cache.layers) == 2
    logits = []
    for start, stop in [(0, 6), *((at, at + 1) for at in range(6, 14))]:
        inputs = {
            "input_ids": ids[:, start:stop],
            "attention_mask": mask[:, :stop],
            "position_ids": positions[:, start:stop],
            "past_key_values": cache,
            "cache_position": torch.arange(start, stop),
        }
        logits.append(graph_module(**{name: inputs[name] for name in traced.input_names})["logits"])
    given = {"position_ids": positions} if "position_ids" in traced.input_names else {}
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False, **given).logits
    kept = mask.bool()
    # Not bit for bit: products of other shapes add up in another order.
    torch.testing.assert_close(torch.cat(logits, 1)[kept], expected[kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_no_example_size_is_in_the_graph(model_type: str, use_cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(model_type)
    one = trace(config, use_cache=use_cache)
    sizes = Sizes(batch=29, seq=31, past=17)
    assert unmistakable_sizes(empty_model(config)) != sizes
    monkeypatch.setattr(traced_model, "unmistakable_sizes", lambda model, **other_than: sizes)
    assert signature(one.graph_module.graph) == signature(trace(config, use_cache=use_cache).graph_module.graph)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_node_knows_where_it_comes_from(model_type: str) -> None:
    graph_module = trace(tiny_config(model_type), use_cache=True).graph_module
    for node in graph_module.graph.nodes:
        stack = node.meta["nn_module_stack"]
        if node.op in ("call_module", "get_attr"):
            path, cls = next(reversed(stack.values()))
            assert node.target.startswith(path) and isinstance(cls, type)
        if node.op not in ("placeholder", "output"):
            assert node.meta["source"].startswith(f"modeling_{model_type}.py:")


def test_the_stack_is_that_of_the_calls() -> None:
    graph = trace(tiny_config("llama")).graph_module.graph
    (node,) = (n for n in graph.nodes if n.target == "model.layers.1.mlp.up_proj")
    assert [(key, path, cls.__name__) for key, (path, cls) in node.meta["nn_module_stack"].items()] == [
        ("model", "model", "LlamaModel"),
        ("model.layers.1", "model.layers.1", "LlamaDecoderLayer"),
        ("model.layers.1.mlp", "model.layers.1.mlp", "LlamaMLP"),
        ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj", "Linear"),
    ]


def test_conv1d_is_a_leaf() -> None:
    graph_module = trace(tiny_config("gpt2")).graph_module
    leaves = [graph_module.get_submodule(n.target) for n in graph_module.graph.nodes if n.op == "call_module"]
    assert sum(isinstance(leaf, Conv1D) for leaf in leaves) == 4 * 2  # c_attn, c_proj, c_fc, c_proj; two layers


# ---------------------------------------------------------------------------------------- what tracing leaves behind


def patched_attributes() -> list[object]:
    """Everything that tracing replaces, as it is now."""
    places = [
        (masking_utils, "_vmap_for_bhqkv"),
        (masking_utils, "_ignore_causal_mask_sdpa"),
        (masking_utils, "TransformGetItemToIndex"),
        (modeling_attn_mask_utils.AttentionMaskConverter, "_ignore_causal_mask_sdpa"),
        (hf_fx, "_MANUAL_META_OVERRIDES"),
        (hf_fx, "_proxies_to_metas"),
        (hf_fx, "is_fx_tracing"),
        (hf_fx, "_IS_IN_DEBUG_MODE"),
        (hf_fx, "warnings"),
        (hf_fx, "_CURRENT_TRACER"),
        (GradientCheckpointingLayer, "__call__"),
        (nn.Module, "__call__"),
        (nn.Module, "__getattr__"),
        (nn.Module, "register_parameter"),
        (torch, "autocast"),
        *((torch, name) for name in hf_fx.HFTracer._TORCH_METHODS_TO_PATCH),
        *((cls, "forward") for cls in vars(modeling_llama).values() if "forward" in getattr(cls, "__dict__", ())),
        *((modeling_llama, name) for name in ("Cache", "DynamicCache")),
    ]
    return [owner.__dict__[name] for owner, name in places]


class LooksAtValues(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, use_cache=None):
        if input_ids.sum() > 0:
            attention_mask = None
        return super().forward(input_ids=input_ids, attention_mask=attention_mask)


def test_patches_are_undone() -> None:
    before = patched_attributes()
    for _ in range(2):
        trace(tiny_config("llama"), use_cache=True)
        after = patched_attributes()
        assert all(a is b for a, b in zip(before, after, strict=True))


def test_patches_are_undone_when_tracing_fails() -> None:
    model = LooksAtValues(tiny_config("llama"))
    before, flags = patched_attributes(), model.config.to_dict()
    with pytest.raises(TracingError) as failure:
        trace(model)
    assert all(a is b for a, b in zip(before, patched_attributes(), strict=True))
    assert model.config.to_dict() == flags
    message = str(failure.value)
    assert "LooksAtValues" in message and "`if input_ids.sum() > 0:`" in message and "concrete_args" in message
    trace(tiny_config("llama"))  # and the next trace is none the worse


def test_model_and_config_stay_as_they_are() -> None:
    model = tiny_model("llama")
    model.config.use_cache, model.config.output_hidden_states = True, True
    before, attributes = model.config.to_dict(), dict(model.config.__dict__)
    weights = {name: parameter for name, parameter in model.named_parameters()}
    traced = trace(model)
    assert model.config.to_dict() == before and model.config.__dict__ == attributes
    assert traced.config is not model.config and traced.config.to_dict() == before
    assert all(parameter is weights[name] for name, parameter in model.named_parameters())


def test_two_threads_may_trace() -> None:
    expected = {name: signature(trace(tiny_config(name)).graph_module.graph) for name in ("llama", "gpt2")}
    got = {}

    def work(name: str) -> None:
        got[name] = signature(trace(tiny_config(name)).graph_module.graph)

    threads = [threading.Thread(target=work, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == expected


# ------------------------------------------------------------------------------------------- models without weights


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("make", [meta_copy, lambda model: empty_model(model.config)], ids=["copy", "from config"])
def test_meta_model(make, tie: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=tie)
    made = make(model)
    assert type(made) is type(model) and not made.training
    assert all(parameter.is_meta for parameter in made.parameters())
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in made.state_dict().items()} == shapes
    assert (made.lm_head.weight is made.model.embed_tokens.weight) == tie
    buffers = dict(made.named_buffers())
    assert buffers.keys() == dict(model.named_buffers()).keys()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffers[name], buffer)

    graph_module = trace(made).graph_module
    tied = graph_module.get_parameter("lm_head.weight") is graph_module.get_parameter("model.embed_tokens.weight")
    assert tied == tie
    assert torch.equal(graph_module.get_buffer("model.rotary_emb.inv_freq"), buffers["model.rotary_emb.inv_freq"])
    assert graph_module.state_dict().keys() == shapes.keys()


def test_meta_copy_keeps_the_mode() -> None:
    assert meta_copy(tiny_model("gpt2").train()).training
    assert not meta_copy(tiny_model("gpt2")).training


def test_empty_model_takes_architecture_and_dtype_from_the_config() -> None:
    config = tiny_config("llama")
    config.architectures = ["LlamaForSequenceClassification"]
    assert type(empty_model(config)).__name__ == "LlamaForSequenceClassification"
    assert empty_model(config, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32
    config.dtype = torch.float16
    assert empty_model(config).dtype == torch.float16


def test_no_model_for_the_config() -> None:
    with pytest.raises(TracingError, match="goes with AlbertConfig"):
        empty_model(AutoConfig.for_model("albert"))


def test_a_70b_config_touches_no_memory() -> None:
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=3, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256, dtype=torch.bfloat16,
    )  # fmt: skip
    traced = trace(config, use_cache=True)
    tensors = [*traced.graph_module.parameters(), *traced.graph_module.buffers()]
    assert sum(tensor.numel() for tensor in tensors) > 4e9
    assert sum(tensor.numel() for tensor in tensors if not tensor.is_meta) < 1000


# ------------------------------------------------------------------------------------------------ inputs and options


def test_example_inputs() -> None:
    traced = trace(tiny_model("qwen3").bfloat16(), use_cache=True)
    inputs = traced.example_inputs(Sizes(batch=3, seq=5, past=7))
    assert tuple(inputs) == traced.input_names
    shapes = {name: tuple(value.shape) for name, value in inputs.items() if name != "past_key_values"}
    assert shapes == {"input_ids": (3, 5), "attention_mask": (3, 12), "position_ids": (3, 5), "cache_position": (5,)}
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
    """What is asserted passes: XLM's classes, in families/test_encoders."""

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
