"""Models with LoRA adapters, which peft writes into their layers."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

import autodist_fx as adx
from autodist_fx.errors import AutodistError
from tests.support.models import padded_batch, randomized, relative_error, tiny_model

IDS, MASK = padded_batch(2, 9)


def _adapted(family: str) -> peft.PeftModel:
    """With dropout in the adapters (off in eval mode), and B matrices that are not zero."""
    targets: Any = ["c_attn", "c_proj", "c_fc"] if family == "gpt2" else "all-linear"
    config = peft.LoraConfig(
        r=4, target_modules=targets, init_lora_weights=False, lora_dropout=0.1, fan_in_fan_out=family == "gpt2"
    )
    torch.manual_seed(0)
    return peft.get_peft_model(tiny_model(family), config).double().eval()


@pytest.mark.drawn(1)
@pytest.mark.parametrize("family, mesh, tolerance", [("llama", (2, 2), 1e-6), ("gpt2", (2, 1), 1e-9)])
@torch.no_grad()
def test_active_merged_and_disabled_adapters(family: str, mesh: tuple[int, int], tolerance: float) -> None:
    model = _adapted(family)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    active = model(**inputs, use_cache=False).logits
    compiled = adx.compile(model, tp=mesh[0], pp=mesh[1])
    assert relative_error(compiled.simulate(**inputs).logits, active) <= tolerance
    assert any("lora_B" in p.name and p.placement.is_shard for p in compiled.plan.params)
    with model.disable_adapter():
        without = model(**inputs, use_cache=False).logits
        found = adx.compile(model.get_base_model(), tp=mesh[0], pp=mesh[1]).simulate(**inputs).logits
    assert relative_error(found, without) <= tolerance < relative_error(active, without)
    merged = adx.compile(model.merge_and_unload(), tp=mesh[0], pp=mesh[1]).simulate(**inputs).logits
    assert relative_error(merged, active) <= 1e-6


def test_adapters_outside_of_the_layers_are_refused_and_other_things_too() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(AutodistError, match="adds virtual tokens outside of the model's layers"):
        adx.compile(peft.get_peft_model(tiny_model("llama"), config), tp=2)
    with pytest.raises(AutodistError, match=r"compile takes a transformers PreTrainedModel.* got a Linear"):
        adx.compile(nn.Linear(3, 4), tp=2)  # type: ignore[arg-type]


def test_adapters_that_drop_out_while_training_are_refused() -> None:
    with pytest.raises(AutodistError, match=r"draws random numbers .*model.eval\(\)"):
        adx.compile(_adapted("llama").train(), tp=2)


@pytest.mark.drawn(1)
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "use_dora": True},
        {"target_modules": [], "target_parameters": ["q_proj.weight", "mlp.down_proj.weight"]},
    ],
    ids=["DoRA", "of single parameters"],
)
def test_adapters_that_change_weights(config: dict[str, Any]) -> None:
    base = tiny_model("llama")
    without = base(IDS).logits
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, **config))
    randomized(model.get_base_model())
    wanted = model(input_ids=IDS, labels=IDS)
    wanted.loss.backward()
    compiled = adx.compile(model, tp=2, pp=2, train=True)
    assert relative_error(compiled.simulate(input_ids=IDS).logits, wanted.logits) < 1e-6
    assert relative_error(without, wanted.logits) > 1e-3
    found = compiled.gradients(input_ids=IDS, labels=IDS)
    trained = {n: p.grad for n, p in model.get_base_model().named_parameters() if p.requires_grad}
    assert trained.keys() == found.keys() and any("lora_A" in name for name in found)
    assert max(relative_error(found[name], trained[name]) for name in found) < 1e-6
