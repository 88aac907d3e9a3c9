"""Forward hooks, pre-hooks and replaced forwards: in the graph, with the model's own answer; or refused by name."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm
from transformers import PreTrainedModel
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

import autodist_fx as adx
from autodist_fx.errors import AutodistError, TracingError
from tests.support.models import padded_batch, relative_error, tiny_model

VECTOR = torch.linspace(-1, 1, 48, dtype=torch.float64)
IDS, _ = padded_batch()
CHANGES: dict[str, Callable[[Any], object]] = {}
REFUSED: dict[str, Callable[[Any], object]] = {}
SEEN: list[object] = []


def change(function: Callable[[Any], object]) -> Callable[[Any], object]:
    CHANGES[function.__name__] = function
    return function


def refused(function: Callable[[Any], object]) -> Callable[[Any], object]:
    REFUSED[function.__name__] = function
    return function


@change
def hook_on_an_embedding(m: Any) -> None:
    m.transformer.wte.register_forward_hook(lambda module, args, output: output + VECTOR)


@change
def hook_on_a_norm(m: Any) -> None:
    m.transformer.ln_f.register_forward_hook(lambda module, args, output: output * 2)


@change
def hook_on_the_head(m: Any) -> None:
    m.lm_head.register_forward_hook(lambda module, args, output: output.tanh())


@change
def hooks_one_after_the_other(m: Any) -> None:
    m.transformer.h[1].mlp.c_proj.register_forward_hook(lambda module, args, output: output + VECTOR)
    m.transformer.h[1].mlp.c_proj.register_forward_hook(lambda module, args, output: output * 3, prepend=True)


@change
def pre_hook_on_a_linear(m: Any) -> None:
    m.transformer.h[0].attn.c_proj.register_forward_pre_hook(lambda module, args: (args[0] * VECTOR,))


@change
def hook_with_kwargs_on_an_attention(m: Any) -> None:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return (output[0] + kwargs["hidden_states"] if "hidden_states" in kwargs else output[0] * 2, *output[1:])

    m.transformer.h[0].attn.register_forward_hook(hook, with_kwargs=True)


@change
def hook_on_a_layer(m: Any) -> None:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:  # layers return a tuple (transformers 4), or a tensor
        return (output[0] + VECTOR, *output[1:]) if isinstance(output, tuple) else output + VECTOR

    m.transformer.h[0].register_forward_hook(hook)


@change
def pre_hook_on_the_model(m: Any) -> None:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "position_ids": torch.arange(kwargs["input_ids"].shape[1])[None] + 3}

    m.register_forward_pre_hook(hook, with_kwargs=True)


@change
def hook_on_the_model(m: Any) -> None:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        output.logits = output.logits * 2
        return output

    m.register_forward_hook(hook)


@change
def hook_that_reads_other_weights(m: Any) -> None:
    m.transformer.h[0].mlp.register_forward_hook(lambda module, args, output: output + m.transformer.wpe.weight[5])


@change
def hook_that_calls_a_module_of_the_model(m: Any) -> None:
    m.transformer.h[0].mlp.register_forward_hook(lambda module, args, output: m.transformer.h[1].ln_1(output))


@change
def forward_replaced_by_a_method(m: Any) -> None:
    head = m.lm_head
    head.forward = types.MethodType(lambda self, x: nn.functional.linear(x, self.weight) * 1.5, head)


@change
def forward_wrapped(m: Any) -> None:
    before = m.transformer.h[0].mlp.c_fc.forward

    @functools.wraps(before)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return before(*args, **kwargs) * 1.5

    m.transformer.h[0].mlp.c_fc.forward = forward


@change
def forward_wrapped_as_a_method(m: Any) -> None:
    mlp = m.transformer.h[0].mlp
    mlp.forward = types.MethodType(functools.wraps(GPT2MLP.forward)(lambda self, x: self.c_proj(self.c_fc(x))), mlp)


@change
def forward_replaced_by_a_partial(m: Any) -> None:
    norm = m.transformer.ln_f
    norm.forward = functools.partial(lambda module, scale, x: x * module.weight * scale, norm, 3.0)


@change
def forward_of_the_model_replaced(m: Any) -> None:
    before = m.forward

    @functools.wraps(before)
    def forward(*args: Any, **kwargs: Any) -> Any:
        output = before(*args, **kwargs)
        output.logits = -output.logits
        return output

    m.forward = forward


@change
def weight_normalized(m: Any) -> None:
    weight_norm(m.lm_head)
    with torch.no_grad():
        m.lm_head.weight_g.mul_(1.5)


@change
def weight_normalized_by_a_parametrization(m: Any) -> None:
    parametrizations.weight_norm(m.lm_head)
    with torch.no_grad():
        m.lm_head.parametrizations.weight.original0.mul_(1.5)


@change
def pruned(m: Any) -> None:
    prune.random_unstructured(m.lm_head, "weight", amount=0.5)


@change
def weight_that_is_no_parameter(m: Any) -> None:
    weight = m.lm_head.weight.detach() * 2
    del m.lm_head.weight
    m.lm_head.weight = weight


@change
def device_map_with_a_hook(m: Any) -> None:
    accelerate.dispatch_model(m, {"": "cpu"}, force_hooks=True)
    m.lm_head.register_forward_hook(lambda module, args, output: output * 2)


@pytest.mark.drawn(5)
@torch.no_grad()
@pytest.mark.parametrize("name", CHANGES)
def test_is_part_of_the_graph(name: str) -> None:
    model = tiny_model("gpt2", tie_word_embeddings=False)
    before = model(IDS).logits
    CHANGES[name](model)
    wanted = model(input_ids=IDS).logits
    assert relative_error(wanted, before) > 1e-3
    split = adx.compile(model, tp=2, pp=2)
    assert relative_error(split.simulate(input_ids=IDS).logits, wanted) < 1e-9
    assert relative_error(model(input_ids=IDS).logits, wanted) == 0  # the model is as it was


def test_a_forward_of_a_class_that_torch_did_not_write_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2")
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: nn.functional.linear(x, self.weight) * 2)
    monkeypatch.setattr(GPT2MLP, "forward", functools.wraps(GPT2MLP.forward)(lambda self, x: self.c_proj(self.c_fc(x))))
    assert relative_error(adx.compile(model, tp=2).simulate(input_ids=IDS).logits, model(IDS).logits) < 1e-9


def test_compiled_forwards_and_requires_grad_hooks_change_nothing() -> None:
    model = tiny_model("gpt2")
    wanted = model(IDS).logits
    model.enable_input_require_grads()
    layer = model.transformer.h[0]
    layer.mlp.forward = torch.compile(layer.mlp.forward)
    assert relative_error(adx.compile(model, tp=2).simulate(input_ids=IDS).logits, wanted) < 1e-9


def test_a_device_map_s_hooks_are_not_traced() -> None:
    model = tiny_model("gpt2")
    plain = adx.compile(model, tp=2).rank(1).code
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert "forward" in vars(model.lm_head)
    assert adx.compile(model, tp=2).rank(1).code == plain


def test_weight_norm_has_its_gradients() -> None:
    model = tiny_model("gpt2", tie_word_embeddings=False)
    weight_norm(model.lm_head)
    model(IDS, labels=IDS).loss.backward()
    found = adx.compile(model, tp=2, pp=2, train=True).gradients(input_ids=IDS, labels=IDS)
    assert {"lm_head.weight_g", "lm_head.weight_v"} < found.keys()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert relative_error(found[name], parameter.grad) < 1e-9, name


@refused
def keeps_outputs_in_a_list(m: Any) -> None:
    seen: list[object] = []
    m.transformer.h[0].mlp.register_forward_hook(lambda module, args, output: seen.append(output))


@refused
def keeps_outputs_in_a_global(m: Any) -> None:
    m.transformer.h[0].mlp.register_forward_hook(lambda module, args, output: SEEN.append(args[0]))


@refused
def keeps_outputs_on_the_module(m: Any) -> None:
    m.lm_head.register_forward_hook(lambda module, args, output: setattr(module, "last", output))


@refused
def keeps_outputs_in_an_object(m: Any) -> None:
    class Recorder:
        last: object = None

        def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
            self.last = output

    m.lm_head.register_forward_hook(Recorder())


@refused
def counts_calls(m: Any) -> None:
    class Counter:
        calls = 0

        def hook(self, module: nn.Module, args: Any) -> Any:
            self.calls += 1
            return (args[0] * self.calls,)

    m.lm_head.register_forward_pre_hook(Counter().hook)


@refused
def looks_at_values(m: Any) -> None:
    m.lm_head.register_forward_hook(lambda module, args, output: output * 2 if output.max() > 0 else output)


@refused
def forward_that_keeps_outputs(m: Any) -> None:
    before, seen = m.lm_head.forward, {}

    def forward(x: torch.Tensor) -> torch.Tensor:
        seen["x"] = x
        return before(x)

    m.lm_head.forward = forward


@pytest.mark.parametrize("name", REFUSED)
def test_hooks_with_side_effects_are_refused_by_name(name: str) -> None:
    model = tiny_model("gpt2")
    REFUSED[name](model)
    with pytest.raises(TracingError) as refusal:
        adx.compile(model, tp=2)
    message = str(refusal.value)
    assert "\n" not in message and (f"{name}.<locals>" in message or "Recorder" in message)
    assert "lm_head" in message or "h.0.mlp" in message


def test_hooks_of_all_modules_are_refused() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        with pytest.raises(AutodistError, match="registered for all modules"):
            adx.compile(tiny_model("gpt2"), tp=2)
    finally:
        handle.remove()


def test_a_hook_that_cannot_be_copied_is_named() -> None:
    model: PreTrainedModel = tiny_model("gpt2")
    with open(__file__) as model.log:
        with pytest.raises(TracingError, match="cannot copy the structure of GPT2LMHeadModel"):
            adx.compile(model, tp=2)
