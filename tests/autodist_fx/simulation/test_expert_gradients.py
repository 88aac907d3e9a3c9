"""Gradients of mixtures of experts, in float64 to 1e-9: experts dealt whole to the ranks, and cut inside; with and
without a token."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from autodist_fx.api.compiled_model import CompiledModel
from tests.support.float64 import in_float64
from tests.support.moe import FOUR, dbrx_experts, experts_are_modules, tiny_moe_model
from tests.support.training.gradients import (
    batch_of,
    check_gradients,
    compiled_for_training,
    eager_gradients,
    gradient_errors,
)

# Experts that are parts of one weight, dealt: by a loop over them, or in one node.
PARTS_DEALT = ({"D(0)"}, {"S(0)"})


def _model(family: str, layers: int = 1) -> PreTrainedModel:
    return tiny_moe_model(family, num_hidden_layers=layers, **FOUR, **(dbrx_experts(4) if family == "dbrx" else {}))


def _lie(compiled: CompiledModel) -> set[str]:
    """How the weights of routed experts lie."""
    experts = (".experts.", "input_linear", "output_linear")
    return {str(p.placement) for p in compiled.plan.params if p.matmul and any(part in p.name for part in experts)}


@pytest.mark.drawn(2)
# Loops over the experts that were hit, one with a shared expert beside them (Qwen2); rows that are sorted and joined
# (DeepSeek-V2); a loop over all, and groups (V3); parts of one weight (DBRX, and all of them in transformers 5).
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v2", "deepseek_v3", "dbrx"])
def test_dealt_experts(family: str) -> None:
    with in_float64():
        model = _model(family)
        lie = _lie(check_gradients(model, batch_of(), (4, 1), (2, 1)))
        assert lie == {"O(0)", "O(1)"} if experts_are_modules(model) else lie in PARTS_DEALT


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_dealt_experts_over_stages(family: str) -> None:
    with in_float64():
        check_gradients(_model(family, layers=2), batch_of(), (2, 2))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_more_experts_than_fit_evenly(family: str) -> None:
    """Five on three ranks: each cut inside, or two, two and one."""
    with in_float64():
        model, inputs = tiny_moe_model(family, num_hidden_layers=1), batch_of()
        wanted = eager_gradients(model, inputs)
        for objective in ("shard", "latency"):
            compiled = compiled_for_training(model, inputs, (3, 1), objective=objective)
            assert max(gradient_errors(compiled.gradients(**inputs), wanted).values()) <= 1e-9
        lie = _lie(compiled)
        assert lie == {"O(0)", "O(1)", "O(2)"} if experts_are_modules(model) else lie in PARTS_DEALT


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "dbrx"])
def test_experts_that_get_no_token(family: str) -> None:
    """Every token goes to the same two of four: on two ranks of four no expert has anything to do, and backward they
    take part nevertheless."""
    with in_float64():
        model = _model(family)
        router = next(p for n, p in model.named_parameters() if n.endswith((".gate.weight", "router.layer.weight")))
        with torch.no_grad():
            router.zero_()  # all scores are equal: topk takes the same for all tokens
        inputs = batch_of()
        got = check_gradients(model, inputs, (4, 1)).gradients(**inputs)
    weights = [g for name, g in got.items() if ".experts." in name]
    if family != "dbrx":  # whose weights have all experts in one dim
        each = weights if experts_are_modules(model) else [part for g in weights for part in g]
        assert sum(not bool(g.any()) for g in each) == len(each) // 2


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_the_second_opinion(family: str) -> None:
    compiled_for_training(_model(family), batch_of(), (2, 1)).verify(numeric=True)
