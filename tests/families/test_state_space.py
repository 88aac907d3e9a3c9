"""State-space, recurrent and hybrid models: right on every mesh, with their scans as single nodes of the graph, and
decoding with caches of their own."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from tiny_models import padded_batch, relative_error
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import autodist_fx as adx
from autodist_fx.errors import AutodistError

_TINY = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_MAMBA_1 = {"num_hidden_layers": 2, "state_size": 5, "time_step_rank": 3, "hidden_size": 48, "vocab_size": 101}
_MAMBA_2 = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_d_state": 7, "mamba_n_groups": 2, "mamba_chunk_size": 4}
_ZAMBA = {
    **_TINY, "mamba_d_state": 5, "num_key_value_heads": 6, "attention_hidden_size": 96, "attention_head_dim": 16,
}  # fmt: skip
# chunk sizes that the sequence is longer than, and does not divide
CONFIGS: dict[str, dict[str, Any]] = {
    "mamba": _MAMBA_1,
    "falcon_mamba": _MAMBA_1,
    "mamba2": {
        "num_hidden_layers": 2, "vocab_size": 101, "hidden_size": 48, "num_heads": 6, "head_dim": 16, "state_size": 7,
        "n_groups": 2, "chunk_size": 4,
    },
    "bamba": {**_TINY, **_MAMBA_2, "attn_layer_indices": [1]},
    "falcon_h1": {**_TINY, **_MAMBA_2, "mamba_d_ssm": 96},
    "granitemoehybrid": {
        **_TINY, **_MAMBA_2, "layer_types": ["mamba", "attention"], "num_local_experts": 0,
        "shared_intermediate_size": 80,
    },
    "zamba": {
        **_ZAMBA, "num_hidden_layers": 4, "mamba_dt_rank": 3,
        "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        **_ZAMBA, "n_mamba_heads": 6, "mamba_ngroups": 2, "chunk_size": 4, "num_mem_blocks": 1, "mamba_headdim": 16,
        "layers_block_type": ["mamba", "hybrid"], "adapter_rank": 4,
    },
    "recurrent_gemma": {**_TINY, "num_hidden_layers": 3, "lru_width": 48, "attention_window_size": 12,
                        "num_key_value_heads": 1},
    "rwkv": {"num_hidden_layers": 2, "vocab_size": 101, "hidden_size": 48, "attention_hidden_size": 48,
             "context_length": 64},
    "lfm2": {**_TINY, "layer_types": ["conv", "full_attention"]},
}  # fmt: skip
MESHES = {"recurrent_gemma": ((3, 1),), "mamba": ((3, 1), (1, 2)), "bamba": ((3, 1), (1, 2))}  # others: (2, 2)


def state_space_model(family: str, **changes: Any) -> PreTrainedModel:
    """In float64, every parameter random."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**CONFIGS[family], **changes})
    model = AutoModelForCausalLM.from_config(config).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(noise * 0.2)
    return model


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_forward_equals_eager(family: str) -> None:
    """At lengths below and above windows and chunks, since one graph serves them all."""
    model = state_space_model(family)
    for mesh in MESHES.get(family, ((2, 2),)):
        compiled = adx.compile(model, tp=mesh[0], pp=mesh[1])
        for length in (3, 14):
            ids, mask = padded_batch(seq=length)
            # a row that sees nothing but padding is NaN in this one's eager attention, and the next takes no mask
            inputs = {"input_ids": ids} if family in ("zamba", "rwkv") else {"input_ids": ids, "attention_mask": mask}
            expected = state_space_model(family)(**inputs, use_cache=False).logits  # a new one: some keep a state
            found = compiled.simulate(**inputs).logits
            assert relative_error(found, expected) <= 1e-6, (mesh, length)


def _eager_decoding(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits of a prompt and of one token after the other, as transformers' generate calls the model."""
    taken = set(inspect.signature(model.forward).parameters) - {"logits_to_keep"}
    kept: dict[str, Any] = {
        "attention_mask": mask[:, :prompt], "use_cache": True, "cache_position": torch.arange(prompt),
    }  # fmt: skip
    logits = []
    for stop in range(prompt, ids.shape[1] + 1):
        inputs = model.prepare_inputs_for_generation(ids[:, :stop], **kept)
        outputs = model(**{name: value for name, value in inputs.items() if name in taken})
        logits.append(outputs.logits)
        kept = model._update_model_kwargs_for_generation(outputs, kept)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_decoding_with_the_models_own_cache_equals_eager(family: str) -> None:
    """A prompt, then one token at a time; all on the ranks' own states."""
    prompt, total = 6, 9
    ids, mask = padded_batch(seq=total)
    if family in ("zamba", "rwkv"):
        ids, mask = ids[1:], mask[1:]
    # its cache has as many tokens as the window, and other code for longer prompts
    model = state_space_model(family, **({"attention_window_size": 32} if family == "recurrent_gemma" else {}))
    if family == "recurrent_gemma":  # transformers' own generate gives it all tokens at each step
        positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False, **positions).logits
    else:
        expected = _eager_decoding(state_space_model(family), ids, mask, prompt)
    layers_of_each = family in ("bamba", "falcon_h1", "zamba", "lfm2", "granitemoehybrid")
    compiled = adx.compile(
        model, tp=2, pp=1 if family == "recurrent_gemma" else 2, use_cache=True, cuts=[1] if layers_of_each else None
    )
    cache, logits = None, []
    for start, stop in [(0, prompt), *((at, at + 1) for at in range(prompt, total))]:
        inputs = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop], "past_key_values": cache}
        if "position_ids" in inspect.signature(model.forward).parameters:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:stop]
        step = compiled.simulate(**inputs)
        cache = step.past_key_values
        logits.append(step.logits)
    kept = mask.bool()
    assert relative_error(torch.cat(logits, 1)[kept], expected[kept]) <= 1e-6
    assert cache is not None and cache.get_seq_length() == total
    first, last = set(cache.ranks[0]), set(cache.ranks[-1])
    assert first or last
    if layers_of_each:
        assert first and last and not first & last, "each stage has the states of its own layers"


@torch.no_grad()
def test_two_tokens_after_the_prompt_are_refused() -> None:
    """Such a model has a graph for a prompt and one for one token more."""
    compiled = adx.compile(state_space_model("mamba"), tp=1, pp=1, use_cache=True)
    ids, _ = padded_batch(seq=6)
    cache = compiled.simulate(input_ids=ids[:, :4], past_key_values=None).past_key_values
    with pytest.raises(AutodistError, match="one token at a time"):
        compiled.simulate(input_ids=ids[:, 4:], past_key_values=cache)
