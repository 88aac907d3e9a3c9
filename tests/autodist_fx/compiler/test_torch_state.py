"""What is set for a computation, and other threads, leave a compilation as it is."""

from __future__ import annotations

import threading

import pytest
import torch

import autodist_fx as adx
from autodist_fx.api.compiled_model import CompiledModel
from autodist_fx.errors import TracingError
from tests.support.gradients import batch_of, eager_gradients, gradient_errors
from tests.support.models import padded_batch, relative_error, tiny_model

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
