"""A compilation follows its model: weights, layers, adapters, dtype, mode and config as they are at each call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import PreTrainedModel

import autodist_fx as adx
from autodist_fx.errors import AutodistError
from tests.support.models import padded_batch, randomized, relative_error, tiny_model

IDS, MASK = padded_batch(2, 9)
INPUTS = {"input_ids": IDS, "attention_mask": MASK}


def _fc(model: PreTrainedModel) -> nn.Module:
    """GPT-2's first feed-forward layer, which is split over ranks."""
    return model.transformer.h[0].mlp.c_fc


def _step(model: PreTrainedModel) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(**INPUTS, labels=IDS, use_cache=False).loss.backward()
    optimizer.step()
    model.zero_grad()


def _another_parameter(model: PreTrainedModel) -> None:
    _fc(model).weight = nn.Parameter(_fc(model).weight.detach() * 3)


def _another_module(model: PreTrainedModel) -> None:
    model.transformer.ln_f = randomized(nn.LayerNorm(model.config.n_embd).double(), 4)  # type: ignore[arg-type]


def _untied(model: PreTrainedModel) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)


def _tied_again(model: PreTrainedModel) -> None:
    _untied(model)
    model.tie_weights()
    model.transformer.wte.weight.data.mul_(2)


def _another_forward(model: PreTrainedModel) -> None:
    forward = _fc(model).forward
    _fc(model).forward = lambda x: forward(x) * 2


def _parametrized(model: PreTrainedModel) -> None:
    norm = parametrizations.weight_norm(model.transformer.ln_f)
    norm.parametrizations.weight.original0.data.mul_(2)


_CHANGES: dict[str, Callable[[PreTrainedModel], object]] = {
    "written in place": lambda model: randomized(model, 9),
    "written behind autograd's back": lambda model: _fc(model).weight.data.mul_(5),
    "load_state_dict": lambda model: model.load_state_dict(tiny_model("gpt2", seed=5).state_dict()),
    "load_state_dict, assigned": lambda m: m.load_state_dict(tiny_model("gpt2", seed=5).state_dict(), assign=True),
    "a step of an optimizer": _step,
    "another parameter": _another_parameter,
    "another module": _another_module,
    "tied again": _tied_again,
    "untied": _untied,
    "more tokens": lambda model: model.resize_token_embeddings(113),
    "another activation": lambda model: setattr(model.transformer.h[0].mlp, "act", nn.Tanh()),
    "a number on a module": lambda model: setattr(model.transformer.ln_f, "eps", 1.0),
    "another forward": _another_forward,
    "a layer less": lambda model: model.transformer.h.pop(1),
    "attention of plain products": lambda model: model.set_attn_implementation("eager"),
    "a parametrization": _parametrized,
    "pruned": lambda model: prune.l1_unstructured(_fc(model), "weight", amount=0.5),
}


@pytest.mark.drawn(6)
@pytest.mark.parametrize("change", _CHANGES)
def test_simulate_computes_what_the_model_does_after_a_change(change: str) -> None:
    model = tiny_model("gpt2")
    compiled = adx.compile(model, tp=2, verify=False)
    with torch.no_grad():
        before = compiled.simulate(**INPUTS).logits
    _CHANGES[change](model)
    with torch.no_grad():
        truth, found = model(**INPUTS, use_cache=False).logits, compiled.simulate(**INPUTS).logits
    if change != "attention of plain products":
        assert truth.shape != before.shape or relative_error(truth, before) > 1e-3
    assert relative_error(found, truth) <= 1e-9


def test_weights_that_change_are_read_and_nothing_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2")
    compiled = adx.compile(model, tp=2, verify=False)
    compiled.simulate(**INPUTS)
    traced = compiled.main
    randomized(model, 9)
    _another_parameter(model)
    model.config.use_cache = False
    model.generation_config.max_length = 7
    compiled.simulate(**INPUTS)
    assert compiled.main is traced
    lent = {p.untyped_storage().data_ptr() for p in model.parameters()}
    rank = compiled.rank(1)
    assert rank.get_parameter("transformer.wte.weight").untyped_storage().data_ptr() in lent
    assert rank.get_parameter("transformer.h.0.mlp.c_proj.weight").untyped_storage().data_ptr() in lent


@torch.no_grad()
def test_a_buffer_that_is_written_in_place() -> None:
    model = tiny_model("llama")
    compiled = adx.compile(model, tp=2, verify=False)
    before = compiled.simulate(**INPUTS).logits
    model.model.rotary_emb.inv_freq.mul_(0.5)
    truth = model(**INPUTS, use_cache=False).logits
    assert relative_error(truth, before) > 1e-3
    assert relative_error(compiled.simulate(**INPUTS).logits, truth) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_another_dtype(dtype: torch.dtype) -> None:
    model = tiny_model("gpt2")
    compiled = adx.compile(model, tp=2, verify=False)
    compiled.simulate(**INPUTS)
    model.to(dtype)
    found, truth = compiled.simulate(**INPUTS).logits, model(**INPUTS, use_cache=False).logits
    assert found.dtype == truth.dtype == dtype
    assert relative_error(found, truth) <= 30 * torch.finfo(dtype).eps


@torch.no_grad()
def test_modes_come_and_go() -> None:
    """Without dropout training computes the same; with it, it is refused as long as it lasts."""
    model = tiny_model("gpt2", attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    compiled = adx.compile(model, tp=2, verify=False)
    in_eval = compiled.main
    model.train()
    assert relative_error(compiled.simulate(**INPUTS).logits, model(**INPUTS).logits) <= 1e-9
    assert compiled.main is not in_eval
    model.transformer.drop.p = 0.1
    with pytest.raises(AutodistError, match=r"draws random numbers .*model.eval\(\)"):
        compiled.simulate(**INPUTS)
    model.transformer.drop.p = 0.0
    model.eval()
    assert relative_error(compiled.simulate(**INPUTS).logits, model(**INPUTS).logits) <= 1e-9
    assert compiled.main is in_eval


def _gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    model(**INPUTS, labels=IDS, use_cache=False).loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def _freeze(model: PreTrainedModel) -> None:
    model.transformer.h[0].requires_grad_(False)


@pytest.mark.drawn(2)
@pytest.mark.parametrize("change", [_step, _freeze, _untied, lambda model: model.float()])
def test_gradients_are_those_of_the_model_as_it_is(change: Callable[[PreTrainedModel], Any]) -> None:
    model = tiny_model("gpt2")
    compiled = adx.compile(model, tp=2, pp=2, train=True, verify=False)
    compiled.gradients(**INPUTS, labels=IDS)
    change(model)
    truth, found = _gradients(model), compiled.gradients(**INPUTS, labels=IDS)
    assert found.keys() == truth.keys()
    tolerance = 1e-9 if model.dtype == torch.float64 else 1e-4
    assert max(relative_error(found[name], truth[name]) for name in truth) <= tolerance


def test_a_model_with_all_frozen_has_no_gradients() -> None:
    model = tiny_model("gpt2")
    compiled = adx.compile(model, tp=2, train=True, verify=False)
    model.requires_grad_(False)
    with pytest.raises(AutodistError, match="loss depends on no parameter that wants a gradient"):
        compiled.gradients(**INPUTS, labels=IDS)


def _adapted() -> peft.PeftModel:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], init_lora_weights=False, fan_in_fan_out=True)
    model = peft.get_peft_model(tiny_model("gpt2"), config)
    model.add_adapter("other", config)
    model.set_adapter("default")  # which freezes the other one
    return model.double().eval()


@torch.no_grad()
def test_adapters_are_switched_scaled_disabled_merged_and_taken_out() -> None:
    model = _adapted()
    compiled = adx.compile(model, tp=2, verify=False)
    answers: list[torch.Tensor] = []

    def check() -> None:
        answers.append(model(**INPUTS, use_cache=False).logits)
        assert relative_error(compiled.simulate(**INPUTS).logits, answers[-1]) <= 1e-9

    check()
    first = compiled.main
    model.set_adapter("other")
    check()
    with model.disable_adapter():
        check()
    for different in (answers[1], answers[2]):
        assert relative_error(different, answers[0]) > 1e-3
    model.set_adapter("default")
    check()
    assert compiled.main is first
    for layer in (m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)):
        layer.scale_layer(3.0)
    check()
    assert relative_error(answers[-1], answers[0]) > 1e-3
    model.merge_adapter()
    check()
    model.unmerge_adapter()
    check()
    model = model.merge_and_unload()
    check()


@torch.no_grad()
def test_a_cache_goes_on_with_other_weights_and_not_with_another_structure() -> None:
    model = _adapted()
    compiled = adx.compile(model, tp=2, use_cache=True, verify=False)
    for weights in (lambda: randomized(model.get_base_model(), 9), lambda: model.set_adapter("other")):
        found, truth = (run(input_ids=IDS[:, :6], use_cache=True) for run in (compiled.simulate, model))
        weights()
        again = {"input_ids": IDS[:, 6:7], "past_key_values": found.past_key_values}
        if compiled.source.structure() != compiled.structure:
            with pytest.raises(AutodistError, match=r"GPT2LMHeadModel is not as it was .*past_key_values=None"):
                compiled.simulate(**again)
        else:
            expected = model(input_ids=IDS[:, 6:7], past_key_values=truth.past_key_values).logits
            assert relative_error(compiled.simulate(**again).logits, expected) <= 1e-9


@torch.no_grad()
def test_save_writes_the_model_as_it_is(tmp_path: Path) -> None:
    model = _adapted()
    compiled = adx.compile(model, tp=2)
    compiled.simulate(**INPUTS)
    randomized(model.get_base_model(), 9)
    model.set_adapter("other")
    truth = model(**INPUTS, use_cache=False).logits
    compiled.save(tmp_path / "saved")
    artifact = adx.load(tmp_path / "saved")
    assert relative_error(artifact.simulate(**INPUTS).logits, truth) <= 1e-9


@torch.no_grad()
def test_a_model_that_gets_its_weights_later() -> None:
    with torch.device("meta"):
        model = tiny_model("gpt2")
    compiled = adx.compile(model, tp=2, verify=False)
    with pytest.raises(AutodistError, match="simulate needs weights"):
        compiled.simulate(**INPUTS)
    model.to_empty(device="cpu")
    other = tiny_model("gpt2", seed=3)
    model.load_state_dict(other.state_dict())
    for name, buffer in other.named_buffers():
        model.get_buffer(name).copy_(buffer)
    truth = other(**INPUTS, use_cache=False).logits
    assert relative_error(compiled.simulate(**INPUTS).logits, truth) <= 1e-9
