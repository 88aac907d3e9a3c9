"""Traced graphs give what the model gives, for any sizes, and tracing leaves no trace on torch and transformers."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    masking_utils,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama import modeling_llama
from transformers.pytorch_utils import Conv1D

from autodist_fx.errors import TracingError
from autodist_fx.tracing import Sizes, empty_model, meta_copy, trace, traced_model
from autodist_fx.tracing.example_inputs import unmistakable_sizes
from autodist_fx.tracing.versions import masks
from autodist_fx.tracing.versions.tracer_base import SymbolicTracer
from passes.fx import node_meta
from tests.support.graphs.traced import FAMILIES, padded_batch, tiny_config, tiny_model, with_weights


def signature(graph: torch.fx.Graph) -> list[tuple[object, ...]]:
    """A graph as plain values, to compare two of them."""
    return [(node.op, node.name, node.target, str(node.args), str(node.kwargs)) for node in graph.nodes]


@pytest.mark.drawn(5)
@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_graph_equals_eager_bit_for_bit(model_type: str) -> None:
    model = tiny_model(model_type)
    graph_module = with_weights(trace(model), model)
    for batch, seq in ((2, 9), (3, 14), (1, 4)):
        ids, mask = padded_batch(batch, seq)
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        assert torch.equal(graph_module(input_ids=ids, attention_mask=mask)["logits"], expected)


@pytest.mark.drawn(5)
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


@pytest.mark.drawn(4)
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_no_example_size_is_in_the_graph(model_type: str, use_cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(model_type)
    one = trace(config, use_cache=use_cache)
    sizes, other = Sizes(batch=29, seq=31, past=17), Sizes(batch=37, seq=41, past=23)
    assert unmistakable_sizes(empty_model(config)) != sizes
    chosen = lambda model, other_than=None: other if other_than else sizes  # noqa: E731
    monkeypatch.setattr(traced_model, "unmistakable_sizes", chosen)
    assert signature(one.graph_module.graph) == signature(trace(config, use_cache=use_cache).graph_module.graph)


@pytest.mark.drawn(4)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_node_knows_where_it_comes_from(model_type: str) -> None:
    graph_module = trace(tiny_config(model_type), use_cache=True).graph_module
    for node in graph_module.graph.nodes:
        stack = node_meta.module_stack(node)
        if node.op in ("call_module", "get_attr"):
            path, cls = next(reversed(stack.values()))
            assert node.target.startswith(path) and isinstance(cls, type)
        if node.op not in ("placeholder", "output"):
            assert node_meta.source(node).startswith(f"modeling_{model_type}.py:")


def test_the_stack_is_that_of_the_calls() -> None:
    graph = trace(tiny_config("llama")).graph_module.graph
    (node,) = (n for n in graph.nodes if n.target == "model.layers.1.mlp.up_proj")
    assert [(key, path, cls.__name__) for key, (path, cls) in node_meta.module_stack(node).items()] == [
        ("model", "model", "LlamaModel"),
        ("model.layers.1", "model.layers.1", "LlamaDecoderLayer"),
        ("model.layers.1.mlp", "model.layers.1.mlp", "LlamaMLP"),
        ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj", "Linear"),
    ]


class Moves(LlamaForCausalLM):
    """Moves a tensor by device and dtype, both by position."""

    def forward(self, input_ids, **keywords):
        output = super().forward(input_ids, **keywords)
        output.logits = output.logits.to(input_ids.device, torch.float32)
        return output


@torch.no_grad()
def test_to_with_a_device_and_a_dtype_by_position() -> None:
    model = Moves(tiny_config("llama", num_hidden_layers=1)).double().eval()
    ids, _ = padded_batch(2, 9)
    found = with_weights(trace(model, input_names=("input_ids",)), model)(input_ids=ids)["logits"]
    assert found.dtype == torch.float32 and torch.equal(found, model(ids, use_cache=False).logits)


def test_conv1d_is_a_leaf() -> None:
    graph_module = trace(tiny_config("gpt2")).graph_module
    leaves = [graph_module.get_submodule(n.target) for n in graph_module.graph.nodes if n.op == "call_module"]
    assert sum(isinstance(leaf, Conv1D) for leaf in leaves) == 4 * 2  # c_attn, c_proj, c_fc, c_proj; two layers


# ---------------------------------------------------------------------------------------- what tracing leaves behind


def patched_attributes() -> list[object]:
    """Everything that tracing replaces, as it is now."""
    tracer_module = sys.modules[SymbolicTracer.__module__]  # transformers.utils.fx, or our own
    places = [
        *((masking_utils, name) for name in vars(masking_utils) if not name.startswith("__")),
        *((tracer_module, name) for name in vars(tracer_module) if not name.startswith("__")),
        *((owner, "_ignore_causal_mask_sdpa") for owner in (masks.AttentionMaskConverter,) if owner is not None),
        (GradientCheckpointingLayer, "__call__"),
        (nn.Module, "__call__"),
        (nn.Module, "__getattr__"),
        (nn.Module, "register_parameter"),
        (nn.Module, "__setattr__"),
        (torch, "autocast"),
        *((torch, name) for name in SymbolicTracer._TORCH_METHODS_TO_PATCH),
        *((cls, "forward") for cls in vars(modeling_llama).values() if "forward" in getattr(cls, "__dict__", ())),
        *((modeling_llama, name) for name in ("Cache", "DynamicCache")),
    ]
    return [owner.__dict__.get(name) for owner, name in places]


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
