"""Parameters that transformers keeps in float32 when it loads a model in half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

import autodist_fx as adx
from autodist_fx.tracing import empty_model
from tests.support.models import randomized, relative_error

TOKENS = {"vocab_size": 61, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
T5 = {**TOKENS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
GPT_OSS = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8,
           "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "pad_token_id": 0}  # fmt: skip
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "t5": (AutoModelForSeq2SeqLM, T5 | {"feed_forward_proj": "gated-gelu"}),
    "mt5": (AutoModelForSeq2SeqLM, T5),
    "umt5": (AutoModelForSeq2SeqLM, T5),
    "gpt_oss": (AutoModelForCausalLM, GPT_OSS),
    "ernie4_5_moe": (AutoModelForCausalLM, GPT_OSS | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16}),
}


def _saved(family: str, directory: Path) -> Any:
    auto, sizes = FAMILIES[family]
    randomized(auto.from_config(AutoConfig.for_model(family, **sizes))).save_pretrained(directory)
    return auto


def _dtypes(model: PreTrainedModel) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_loaded_in_the_dtypes_that_transformers_gives_it(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    loaded = _saved(family, tmp_path).from_pretrained(tmp_path, dtype=dtype)
    planned = empty_model(AutoConfig.from_pretrained(tmp_path), dtype)
    assert _dtypes(planned) == _dtypes(loaded)


@torch.no_grad()
def test_t5_in_float16_does_not_overflow_and_its_plan_counts_the_bytes(tmp_path: Path) -> None:
    auto = _saved("t5", tmp_path / "t5")
    whole = auto.from_pretrained(tmp_path / "t5")
    for name, parameter in whole.named_parameters():
        parameter *= 40.0 if ".wi_" in name else 60.0 if ".wo." in name else 1.0
    whole.save_pretrained(tmp_path / "large")
    half = auto.from_pretrained(tmp_path / "large", dtype=torch.float16).eval()
    ids = torch.randint(2, 61, (2, 9))
    expected = half(ids, decoder_input_ids=ids).logits
    assert expected.isfinite().all() and torch.cat([p.abs().view(-1) for p in half.parameters()]).max() > 1

    compiled = adx.compile(half, tp=2, pp=2, input_names=("input_ids", "decoder_input_ids"))
    found = compiled.simulate(input_ids=ids, decoder_input_ids=ids).logits
    assert found.isfinite().all() and relative_error(found.float(), expected.float()) < 0.02
    of_config = adx.compile(half.config, tp=2, pp=2, input_names=("input_ids", "decoder_input_ids"))
    kinds = {param.name: param.dtype for param in of_config.plan.params}
    assert kinds == {param.name: param.dtype for param in compiled.plan.params}
    assert kinds["decoder.block.0.layer.2.DenseReluDense.wo.weight"] == "float32"
