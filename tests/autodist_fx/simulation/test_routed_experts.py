"""A layer of routed experts as one node (transformers 5): whole ones dealt to ranks or each cut inside, forward and
backward, and refused where a rank runs others than it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import Node
from transformers import PreTrainedModel

import autodist_fx as adx
from autodist_fx.api.compiled_model import CompiledModel
from cost_model.errors import VerificationError
from passes.ops.experts import experts
from passes.partition.pipeline import emit_rank
from passes.program.rank_program import RankProgram
from passes.verify.verify import verify
from tests.support.float64 import in_float64
from tests.support.models import padded_batch, relative_error
from tests.support.moe import FOUR, tiny_moe_model
from tests.support.training.gradients import batch_of, compiled_for_training, eager_gradients, gradient_errors

pytest.importorskip("transformers.integrations.moe", reason="4.57 has a module for each expert")

WHOLE, INSIDE = ("S(0)", "S(0)"), ("S(1)", "S(2)")
# GPT-OSS: weights the other way round, gate and up by turns, biases, and a gate of its own with clamps.
ALL_WHOLE, ALL_INSIDE = ("S(0)", "S(0)", "S(0)", "S(0)"), ("S(2)", "S(1)", "S(1)", "R")


def model_of(family: str, **sizes: Any) -> PreTrainedModel:
    model = tiny_moe_model(family, num_hidden_layers=1, **sizes)
    model.set_experts_implementation("eager")  # transformers' own products in groups know no float64
    return model


def nodes_of(program: RankProgram) -> list[Node]:
    return [n for n in program.graph_module.graph.nodes if n.target is experts]


def weights_lie(compiled: CompiledModel) -> set[tuple[str, ...]]:
    return {tuple(map(str, op.inputs[3:])) for op in compiled.plan.ops if op.kind == "experts"}


@pytest.mark.parametrize(
    ("family", "mesh", "pin", "lie"),
    [
        ("mixtral", (3, 1), {}, {WHOLE}),  # five experts: two, two and one
        ("qwen3_moe", (2, 1), {"experts": "inner"}, {INSIDE}),
        ("qwen2_moe", (2, 1), {"experts": "replicate"}, {("R", "R")}),  # beside a shared expert
        ("gpt_oss", (3, 1), {}, {ALL_WHOLE}),
        ("gpt_oss", (3, 1), {"experts": "inner"}, {ALL_INSIDE}),
    ],
)
def test_simulated_ranks_give_what_the_model_gives(
    family: str, mesh: tuple[int, int], pin: dict[str, str], lie: set[tuple[str, ...]]
) -> None:
    model = model_of(family)
    ids, mask = padded_batch()
    compiled = adx.compile(model, tp=mesh[0], pp=mesh[1], input_names=("input_ids", "attention_mask"), pin=pin)
    assert len(nodes_of(compiled.program(0))) == 1 and weights_lie(compiled) == lie
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
    assert relative_error(compiled.simulate(input_ids=ids, attention_mask=mask).logits, expected) < 1e-6


@pytest.mark.parametrize("pin", [{}, {"experts": "inner"}], ids=["dealt", "cut inside"])
@pytest.mark.parametrize(("family", "lie"), [("mixtral", (WHOLE, INSIDE)), ("gpt_oss", (ALL_WHOLE, ALL_INSIDE))])
def test_gradients_also_of_ranks_whose_experts_get_no_token(
    family: str, lie: tuple[tuple[str, ...], tuple[str, ...]], pin: dict[str, str]
) -> None:
    with in_float64():
        model, inputs = model_of(family, **FOUR), batch_of()
        router = next(p for n, p in model.named_parameters() if n.endswith((".gate.weight", "router.weight")))
        with torch.no_grad():
            router.zero_()  # topk takes the same two for all tokens
        wanted = eager_gradients(model, inputs)
        compiled = compiled_for_training(model, inputs, (4, 1), pin=pin)
        assert weights_lie(compiled) == {lie[bool(pin)]}
        assert max(gradient_errors(compiled.gradients(**inputs), wanted).values()) <= 1e-9


def test_the_second_opinion() -> None:
    adx.compile(model_of("gpt_oss"), tp=2, pin={"experts": "inner"}, verify=False).verify(numeric=True)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_an_artifact_holds_the_node(tmp_path: Path, family: str) -> None:
    model = model_of(family)
    ids, mask = padded_batch()
    compiled = adx.compile(model, tp=2, input_names=("input_ids", "attention_mask"))
    compiled.save(tmp_path / "split")
    loaded = adx.load(tmp_path / "split")
    found = loaded.simulate(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(found, compiled.simulate(input_ids=ids, attention_mask=mask).logits)


def others_run(node: Node) -> None:
    """Rank 1 runs the experts of rank 0 with its own weights."""
    node.args = (*node.args[:11], ((0, 2),))


def all_run(node: Node) -> None:
    node.args = node.args[:11]


def another_activation(node: Node) -> None:
    node.args = (*node.args[:7], (("gelu", "gate"), ("mul", "%0", "up")), *node.args[8:])


def by_turns(node: Node) -> None:
    node.args = (*node.args[:8], "pairs", *node.args[9:])


def another_count(node: Node) -> None:
    node.args = (*node.args[:10], 3, *node.args[11:])


def swapped(node: Node) -> None:
    """Gate and down change places."""
    node.args = (*node.args[:3], node.args[4], node.args[3], *node.args[5:])


@pytest.mark.parametrize("broken", [others_run, all_run, another_activation, by_turns, another_count, swapped])
def test_a_rank_that_runs_something_else_is_refused(broken: Any) -> None:
    model = model_of("mixtral", **FOUR)
    made = adx.compile(model, tp=2, verify=False, input_names=("input_ids", "attention_mask"))
    programs = [emit_rank(made.graph, made.plan, rank) for rank in range(2)]
    verify(programs, made.plan, made.op_graph, made.graph)
    broken(nodes_of(programs[1])[0])
    with pytest.raises(VerificationError, match="experts"):
        verify(programs, made.plan, made.op_graph, made.graph)
