"""Experts dealt whole to ranks: found by the cost of a step, right at every step, and each rank runs its own alone.

In a world without float32 (in_float64), to 1e-9.
"""

from __future__ import annotations

import functools
import inspect
import re

import pytest
import torch
from transformers import PreTrainedModel

import autodist_fx as adx
from autodist_fx.api.compiled_model import CompiledModel
from tests.support.float64 import in_float64
from tests.support.models import padded_batch, relative_error
from tests.support.moe import FOUR, dbrx_experts, experts_are_modules, tiny_moe_model

# Experts that are modules (transformers 4), in loops and in runs of rows; and parts of one weight, split or picked.
FAMILIES = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "phimoe", "dbrx", "granitemoe",
    "gpt_oss", "llama4_text",
)  # fmt: skip
EXPERTS = re.compile(r"\.experts\.|input_linear|output_linear")
MESHES = ((2, 1), (4, 1), (1, 2), (2, 2))


@functools.cache
def _model(family: str) -> PreTrainedModel:
    changes = dbrx_experts(4) if family == "dbrx" else {}
    with in_float64():
        return tiny_moe_model(family, num_hidden_layers=1, **FOUR, **changes)


def _experts(compiled: CompiledModel) -> list[str]:
    """How the weights of routed experts lie."""
    return [
        str(p.placement) for p in compiled.plan.params
        if p.matmul and EXPERTS.search(p.name)
    ]  # fmt: skip


@pytest.mark.one_for_each("family")
@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"{m[0]}x{m[1]}")
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
@in_float64()
def test_a_prompt_and_a_step_equal_eager(family: str, mesh: tuple[int, int]) -> None:
    """In the step each sequence's token goes to some of four experts: others have nothing to do."""
    model, (ids, mask) = _model(family), padded_batch()
    compiled = adx.compile(model, tp=mesh[0], pp=mesh[1], use_cache=True)
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    if "position_ids" not in inspect.signature(model.forward).parameters:
        positions = {}
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False, **positions).logits
    cache, logits = None, []
    for start, stop in ((0, 8), (8, 9)):
        own = {name: value[:, start:stop] for name, value in positions.items()}
        step = compiled.simulate(
            input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, **own
        )
        cache = step.past_key_values
        logits.append(step.logits)
    kept = mask.bool()
    assert relative_error(torch.cat(logits, 1)[kept], expected[kept]) <= 1e-9
    lie = _experts(compiled)
    if mesh[0] > 1 and experts_are_modules(model):
        each = len(lie) // mesh[0]
        assert sorted(lie) == sorted(f"O({rank})" for rank in range(mesh[0]) for _ in range(each))
    elif mesh[0] > 1 and family not in ("gpt_oss", "llama4_text"):  # all experts at once, in one product
        assert set(lie) in ({"D(0)"}, {"S(0)"})  # by a loop over them, or in one node


@pytest.mark.drawn(1)
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "dbrx", "granitemoe"])
@in_float64()
def test_a_rank_has_no_node_and_no_weight_of_other_ranks_experts(family: str) -> None:
    whole = adx.compile(_model(family), tp=1, use_cache=True)
    compiled = adx.compile(_model(family), tp=4, use_cache=True)
    kinds = ("linear", "matmul")

    def products(made: CompiledModel, rank: int) -> int:
        names = {op.name for op in made.op_graph if op.kind in kinds and "~" in str(op.outputs[0].symbols)}
        assert names
        return sum(node.name in names for node in made.rank(rank).graph.nodes)

    def held(made: CompiledModel, rank: int) -> int:
        state = made.rank(rank).state_dict()
        return sum(tensor.numel() for name, tensor in state.items() if EXPERTS.search(name))

    if not any(op.kind == "experts" for op in compiled.op_graph):  # one node, which runs the experts that a rank holds
        assert {4 * products(compiled, rank) for rank in range(4)} == {products(whole, 0)}
    assert {4 * held(compiled, rank) for rank in range(4)} == {held(whole, 0)}


@torch.no_grad()
@in_float64()
def test_more_experts_than_fit_evenly_are_dealt_where_time_alone_decides() -> None:
    model, (ids, mask) = tiny_moe_model("qwen3_moe", num_hidden_layers=1), padded_batch()  # five experts
    by_memory = adx.compile(model, tp=2, use_cache=True)
    by_time = adx.compile(model, tp=2, use_cache=True, objective="latency")
    if experts_are_modules(model):
        assert {"O(0)", "O(1)"}.isdisjoint(_experts(by_memory))
        assert sorted(_experts(by_time)) == ["O(0)"] * 9 + ["O(1)"] * 6
    else:
        assert set(_experts(by_time)) == {"S(0)"}
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -1]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = by_time.simulate(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]
    assert relative_error(got, expected) <= 1e-9


@in_float64()
def test_the_plan_says_that_experts_are_whole_on_one_rank_each() -> None:
    model = _model("mixtral")
    text = str(adx.compile(model, tp=2, use_cache=True).plan)
    rows = [line for line in text.splitlines() if ".experts" in line]
    if experts_are_modules(model):
        assert " expert " in rows[0] and "x4 " in rows[0] and "whole, on one rank each" in rows[0]
    else:
        assert len(rows) == 1 and " experts " in rows[0] and "4x88x48" in rows[0] and "2x88x48" in rows[0]


@in_float64()
def test_a_saved_plan_of_dealt_experts_reads_back(tmp_path: object) -> None:
    plan = adx.compile(_model("dbrx"), tp=2, use_cache=True).plan
    path = f"{tmp_path}/plan.json"
    plan.save(path)
    assert type(plan).load(path) == plan


@pytest.mark.parametrize("family", ["mixtral", "dbrx"])
@in_float64()
def test_programs_to_be_trained_have_the_same_plan(family: str) -> None:
    model = _model(family)
    plan = adx.compile(model, tp=2).plan
    assert adx.compile(model, tp=2, train=True).plan == plan == adx.compile(model, plan=plan, train=True).plan
    assert {str(p.placement) for p in plan.params if EXPERTS.search(p.name)} <= {"O(0)", "O(1)", "D(0)", "S(0)"}
