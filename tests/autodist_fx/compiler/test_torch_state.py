"""Settings for a computation, and other threads, leave a compilation as it is."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import autodist_fx as adx
from autodist_fx.api.compiled_model import CompiledModel
from autodist_fx.errors import AutodistError, TracingError
from tests.support.models import padded_batch, relative_error, tiny_model
from tests.support.training.gradients import batch_of, eager_gradients, gradient_errors

IDS, _ = padded_batch()


def test_compiled_under_inference_mode_and_autocast() -> None:
    model = tiny_model("gpt2")
    plain = adx.compile(model, tp=2, train=True)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        compiled = adx.compile(model, tp=2, train=True)
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
    assert compiled.rank(1).code == plain.rank(1).code
    wanted = eager_gradients(model, batch_of())
    assert max(gradient_errors(compiled.gradients(**batch_of()), wanted).values()) < 1e-9


def test_autocast_inside_the_model_is_refused() -> None:
    model = tiny_model("gpt2").float()
    mlp = model.transformer.h[0].mlp
    mlp.forward = torch.autocast("cpu", dtype=torch.bfloat16)(mlp.forward)
    with pytest.raises(TracingError, match=r"torch.autocast is on in a part of the model.*\.to\(dtype\)"):
        adx.compile(model, tp=2)


@torch.no_grad()
def test_threads_compile_and_run_models_meanwhile() -> None:
    models = [tiny_model(family) for family in ("gpt2", "opt", "gpt2")]
    wanted = [model(IDS).logits for model in models]
    compiled: dict[int, CompiledModel] = {}
    eager: list[float] = []

    def compile_one(index: int) -> None:
        compiled[index] = adx.compile(models[index], tp=2)

    threads = [threading.Thread(target=compile_one, args=(index,)) for index in range(len(models))]
    for thread in threads:
        thread.start()
    other = tiny_model("gpt2")
    of_other = other(IDS).logits
    while any(thread.is_alive() for thread in threads):  # another model, of the same class, runs in this thread
        eager.append(relative_error(other(IDS).logits, of_other))
    assert eager and max(eager) < 1e-12
    for index, logits in enumerate(wanted):
        assert relative_error(compiled[index].simulate(input_ids=IDS).logits, logits) < 1e-9


def test_autocast_and_hooks_of_all_modules_are_refused_at_a_call() -> None:
    model = tiny_model("gpt2")
    compiled = adx.compile(model, tp=2, train=True)
    calls = {"simulate": compiled.simulate, "gradients": compiled.gradients}
    for name, call in calls.items():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with pytest.raises(AutodistError, match=rf"{name}.*autocast is on"):
                call(**batch_of())
        handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: None)
        with pytest.raises(AutodistError, match=r"forward pre-hook .*registered for all modules"):
            call(**batch_of())
        handle.remove()
        call(**batch_of())


def test_calls_in_inference_mode() -> None:
    model = tiny_model("gpt2")
    compiled = adx.compile(model, tp=2, pp=2, train=True)
    with torch.inference_mode():
        wanted = model(IDS).logits
        found = compiled.simulate(input_ids=IDS).logits
        assert found.is_inference() and relative_error(found, wanted) < 1e-9
    wanted_gradients = eager_gradients(model, batch_of())
    assert max(gradient_errors(compiled.gradients(**batch_of()), wanted_gradients).values()) < 1e-9


def test_another_default_dtype_is_followed() -> None:
    model = tiny_model("llama")  # makes its causal mask, and the numbers in it, of the default dtype's
    compiled = adx.compile(model, tp=2)
    before = compiled.graph
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            assert relative_error(compiled.simulate(input_ids=IDS).logits, model(IDS).logits) < 1e-6
        assert compiled.graph is not before
    finally:
        torch.set_default_dtype(torch.float32)


def test_hooks_that_come_go_and_change_are_followed() -> None:
    model, scale = tiny_model("gpt2"), {"by": 2.0}
    compiled = adx.compile(model, tp=2)

    def error() -> float:
        with torch.no_grad():
            return relative_error(compiled.simulate(input_ids=IDS).logits, model(IDS).logits)

    assert error() < 1e-9
    handle = model.transformer.h[0].mlp.register_forward_hook(lambda module, args, output: output * scale["by"])
    assert error() < 1e-9
    scale["by"] = 3.0
    assert error() < 1e-9
    handle.remove()
    assert error() < 1e-9


def test_hooks_of_gradients() -> None:
    model = tiny_model("gpt2")
    mask = (torch.arange(48) % 2).double()
    calls: list[int] = []
    model.transformer.h[0].mlp.c_fc.weight.register_hook(lambda gradient: gradient * mask[:, None])
    model.transformer.ln_f.weight.register_hook(lambda gradient: calls.append(gradient.numel()))
    wanted = eager_gradients(model, batch_of())
    compiled = adx.compile(model, tp=2, pp=2, train=True)
    assert max(gradient_errors(compiled.gradients(**batch_of()), wanted).values()) < 1e-9
    assert calls == [48, 48]
    handle = model.transformer.h[0].register_full_backward_hook(lambda module, given, got: None)
    with pytest.raises(AutodistError, match=r"the backward hook .*lambda.* of transformer.h.0 is called while"):
        compiled.gradients(**batch_of())
    handle.remove()
    model.lm_head.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(AutodistError, match=r"the post-accumulate-grad hook .* of transformer.wte.weight"):
        compiled.gradients(**batch_of())
