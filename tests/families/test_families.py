"""Every family on every mesh gives what the model gives on one device, with and without a KV cache.

In float64, so that a wrong split cannot hide behind rounding: 1e-9 for GPT-2 and OPT, 1e-6 for the families that cast
to float32 inside (norms and rotary tables: Llama, Qwen2, Qwen3, Mistral, Phi-3); see tiny_models.relative_tolerance.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import autodist_fx as adx
from autodist_fx.api.compiled_model import CompiledModel
from cost_model.partition_plan import PartitionPlan
from tests.support.decoding import decoded_logits, positions_of
from tests.support.models import FAMILIES, padded_batch, relative_error, relative_tolerance, tiny_model

MESHES = ((1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (1, 3), (2, 2), (3, 2))
# Heads that no mesh divides, KV heads fewer than ranks, odd vocabularies and widths, tied and untied: (family, changes,
# meshes). Head sizes are given where hidden_size / heads is not what the family would take by itself.
UNEVEN = [
    ("llama", {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72}, ((2, 1), (4, 1), (2, 2))),
    ("llama", {"num_attention_heads": 7, "num_key_value_heads": 7, "hidden_size": 56}, ((2, 1), (3, 1), (4, 1))),
    ("llama", {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 56}, ((2, 1), (4, 1))),
    ("llama", {"num_attention_heads": 6, "num_key_value_heads": 1}, ((3, 1), (4, 1), (3, 2))),
    ("llama", {"num_attention_heads": 6, "num_key_value_heads": 2}, ((3, 1), (4, 1))),
    ("llama", {"vocab_size": 127, "intermediate_size": 53, "tie_word_embeddings": True}, ((2, 1), (3, 1), (3, 2))),
    ("llama", {"attention_bias": True, "mlp_bias": True}, ((2, 1), (4, 1), (2, 2))),
    ("qwen2", {"num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 127}, ((3, 1), (4, 1))),
    ("qwen2", {"num_attention_heads": 6, "num_key_value_heads": 1, "tie_word_embeddings": True}, ((4, 1), (2, 2))),
    ("mistral", {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72}, ((2, 1), (4, 1))),
    ("qwen3", {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True}, ((4, 1), (1, 2))),
    ("phi3", {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 53}, ((3, 1), (4, 1))),
    ("phi3", {"num_attention_heads": 6, "num_key_value_heads": 1}, ((2, 1), (4, 1))),
    ("gpt2", {"n_head": 7, "n_embd": 56, "vocab_size": 127}, ((2, 1), (3, 1), (4, 1), (2, 2))),
    ("gpt2", {"tie_word_embeddings": False}, ((2, 1), (1, 2))),
    ("opt", {"num_attention_heads": 7, "hidden_size": 56, "word_embed_proj_dim": 56}, ((2, 1), (4, 1), (3, 2))),
    ("opt", {"tie_word_embeddings": False, "ffn_dim": 53}, ((2, 1), (2, 2))),
]  # fmt: skip
UNEVEN_CASES = [
    pytest.param(
        family, changes, mesh, id=f"{family}-{'-'.join(f'{k}={v}' for k, v in changes.items())}-{mesh[0]}x{mesh[1]}"
    )
    for family, changes, meshes in UNEVEN
    for mesh in meshes
]


@functools.cache
def _model(family: str, changes: tuple[tuple[str, Any], ...] = ()) -> PreTrainedModel:
    """Shared by the tests of a process: compiling never changes it."""
    return tiny_model(family, **dict(changes))


def _check_forward(model: PreTrainedModel, mesh: tuple[int, int], tolerance: float) -> CompiledModel:
    ids, mask = padded_batch()
    compiled = adx.compile(model, tp=mesh[0], pp=mesh[1])
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert relative_error(compiled.simulate(input_ids=ids, attention_mask=mask).logits, expected) <= tolerance
    return compiled


def _check_decoding(model: PreTrainedModel, mesh: tuple[int, int], tolerance: float) -> CompiledModel:
    ids, mask = padded_batch()
    compiled = adx.compile(model, tp=mesh[0], pp=mesh[1], use_cache=True)
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False, **positions_of(model, mask)).logits
    kept = mask.bool()  # what a padding token attends to is nobody's business, and differs with the cache
    assert relative_error(decoded_logits(compiled, model, ids, mask)[kept], expected[kept]) <= tolerance
    return compiled


def _check_plan_and_graphs(compiled: CompiledModel) -> None:
    """The plan survives JSON, and each rank's graph differs from the model's wherever there is a split."""
    assert PartitionPlan.from_dict(compiled.plan.to_dict()) == compiled.plan
    if compiled.mesh.size > 1:
        assert all(compiled.graph_diff(rank) for rank in range(compiled.mesh.size))


@pytest.mark.one_for_each("family")
@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"{m[0]}x{m[1]}")
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_forward_equals_eager(family: str, mesh: tuple[int, int]) -> None:
    compiled = _check_forward(_model(family), mesh, relative_tolerance(family))
    _check_plan_and_graphs(compiled)


@pytest.mark.one_for_each("family")
@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"{m[0]}x{m[1]}")
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_decoding_with_a_cache_equals_eager(family: str, mesh: tuple[int, int]) -> None:
    compiled = _check_decoding(_model(family), mesh, relative_tolerance(family))
    _check_plan_and_graphs(compiled)


@pytest.mark.drawn(4)
@pytest.mark.parametrize("family, changes, mesh", UNEVEN_CASES)
@torch.no_grad()
def test_uneven_shapes_forward_and_decoding(family: str, changes: dict[str, Any], mesh: tuple[int, int]) -> None:
    model = _model(family, tuple(changes.items()))
    _check_forward(model, mesh, relative_tolerance(family))
    _check_decoding(model, mesh, relative_tolerance(family))


@pytest.mark.drawn(2)
@pytest.mark.parametrize(
    "window, prefill, total",
    [(4, 2, 9), (4, 5, 9), (40, 30, 45), (40, 43, 46), (100, 97, 104)],
    ids=lambda n: str(n),
)
@torch.no_grad()
def test_a_sliding_window_whatever_its_length(window: int, prefill: int, total: int) -> None:
    """Prompts that fill the window and prompts that don't; windows that the example lengths fit into and such that not.

    What is constant in the graph is found at example lengths. Both shorter than the window, they would make a cache
    that grows forever of one that stops growing.
    """
    model = tiny_model("mistral", sliding_window=window, max_position_embeddings=128)
    ids, mask = padded_batch(2, total)
    compiled = adx.compile(model, tp=2, pp=1, use_cache=True)
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False, **positions_of(model, mask)).logits
    kept = mask.bool()
    assert relative_error(decoded_logits(compiled, model, ids, mask, prefill)[kept], expected[kept]) <= 1e-6


@pytest.mark.drawn(1)
@pytest.mark.parametrize("family, mesh", [("llama", (2, 7)), ("opt", (1, 8)), ("phi3", (1, 12))])
@torch.no_grad()
def test_more_stages_than_layers(family: str, mesh: tuple[int, int]) -> None:
    """Cuts inside of attention and MLP, where several tensors cross, sharded and whole."""
    model = _model(family)
    _check_forward(model, mesh, relative_tolerance(family))
    _check_decoding(model, mesh, relative_tolerance(family))


@pytest.mark.drawn(1)
@pytest.mark.parametrize("family, mesh", [("llama", (3, 2)), ("gpt2", (2, 2)), ("phi3", (4, 1))])
@torch.no_grad()
def test_float32(family: str, mesh: tuple[int, int]) -> None:
    """The dtype that people run. Sums over ranks round otherwise than one product does: 1e-5 of the largest logit."""
    model = tiny_model(family, dtype=torch.float32)
    compiled = _check_forward(model, mesh, 1e-5)
    assert compiled.simulate(input_ids=padded_batch()[0]).logits.dtype == torch.float32
    _check_decoding(model, mesh, 1e-5)
