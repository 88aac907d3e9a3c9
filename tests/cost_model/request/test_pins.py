"""Roles and cuts that a user fixes hold in the plan, the rest is searched around them, and contradictions are named."""

from __future__ import annotations

import pytest
import torch

import autodist_fx as adx
from cost_model.costs.hardware import CPU_GLOO
from cost_model.errors import NoPlanFits, PlanError
from cost_model.graph.op_graph import OpGraph
from cost_model.mesh import Mesh
from cost_model.request.pins import roles_by_pin, to_blame
from cost_model.request.plan_request import PlanRequest
from cost_model.search.planner import plan
from cost_model.search.prediction_sizes import all_lengths
from cost_model.search.tensor_parallel import TensorParallelSearch
from tests.support.graphs.searches import assert_optimal
from tests.support.graphs.small import Attention, Ids, Mlp, Stack, op_graph_of
from tests.support.models import padded_batch, relative_error, relative_tolerance, tiny_config, tiny_model

GRAPHS = {
    "mlp": (op_graph_of(Mlp(), x=("B", "S", 8)), [{"up": "row"}, {"down": "column"}, {"up": "replicate"}]),
    "attention": (
        op_graph_of(Attention(12, 4, 2, 3), x=("B", "S", 12)),
        [{"q": "replicate"}, {"k": "row", "o": "column"}, {"*": "replicate"}],
    ),
    "vocabulary": (
        op_graph_of(Stack([Mlp(8, 12, bias=False)], 8, vocab=11, tied=True), x=Ids("B", "S")),
        [{"embed": "hidden"}, {"embed": "vocab", "up": "row"}],
    ),
}
CASES = [(name, tuple(pins.items())) for name, (_, cases) in GRAPHS.items() for pins in cases]


@pytest.mark.drawn(1)
@pytest.mark.parametrize("price", [0.0, 1e-6])
@pytest.mark.parametrize(("name", "pins"), CASES)
def test_the_rest_is_the_best_around_what_is_pinned(
    name: str, pins: tuple[tuple[str, str], ...], price: float
) -> None:
    graph = GRAPHS[name][0]
    roles = roles_by_pin(graph, pins)
    assert roles
    search = TensorParallelSearch(graph, 2, CPU_GLOO, all_lengths({"B": 2, "S": 64}), roles=roles)
    assert_optimal(search, price)
    made = plan(graph, PlanRequest(Mesh(2), CPU_GLOO, pin=pins), model="m", fingerprint="f")
    assert {op: made.op(op).role for op in roles} == roles
    assert made.request.pin == pins


@pytest.mark.drawn(2)
@pytest.mark.parametrize(
    ("family", "tp", "pp", "options"),
    [
        ("llama", 2, 1, {"pin": {"...q_proj": "replicate", "down_proj": "column"}}),
        ("llama", 3, 2, {"pin": {"k_proj": "row", "embed_tokens": "vocab", "lm_head": "row"}, "cuts": [1]}),
        ("llama", 2, 2, {"cuts": ["model.layers.1.mlp.up_proj"], "pin": {"model.layers.0.*": "replicate"}}),
        ("gpt2", 2, 2, {"pin": {"h.*.c_attn": "row", "wte": "hidden"}, "cuts": ["transformer.h.0.mlp"]}),
        ("gpt2", 2, 3, {"pin": {"c_fc": "replicate"}, "cuts": ["transformer.h.1", "transformer.ln_f"]}),
        ("gpt2", 2, 2, {"device_map": ["a100", "h100"], "objective": "memory", "pin": {"h.1.*": "row"}}),
    ],
)
def test_a_model_with_pins_and_cuts_is_the_model(family: str, tp: int, pp: int, options: dict[str, object]) -> None:
    """`compile` verifies the programs, too."""
    model = tiny_model(family)
    compiled = adx.compile(model, tp=tp, pp=pp, **options)
    ids, mask = padded_batch()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        found = compiled.simulate(input_ids=ids, attention_mask=mask).logits
    assert relative_error(found, expected) <= relative_tolerance(family)
    roles = roles_by_pin(compiled.op_graph, tuple(options.get("pin", {}).items()))
    assert roles and all(compiled.plan.op(name).role == role for name, role in roles.items())
    again = adx.compile(model, plan=compiled.plan)
    assert again.plan == compiled.plan


def refused(error: type[Exception], said: str, config: object = None, **options: object) -> None:
    with pytest.raises(error, match=said):
        adx.compile(config or tiny_config("llama"), **{"tp": 2, "hardware": "cpu-gloo", **options})


@pytest.mark.parametrize(
    ("pins", "said"),
    [
        ({"q_prj": "column"}, r"'q_prj' matches no linear or embedding; the nearest: model\.layers\.0\.\S*q_proj"),
        ({"q_proj": "columns"}, r"is a linear, and has no role 'columns': choose column, row, expert or replicate"),
        ({"embed_tokens": "column"}, r"is an embedding, and has no role 'column': choose vocab, hidden or replicate"),
        ({"*.q_proj": "row", "layers.1.*": "column"}, r"'\*\.q_proj' and 'layers\.1\.\*' want model\.layers\.1\."),
    ],
)
def test_a_pin_that_means_nothing_says_what_it_may_have_meant(pins: dict[str, str], said: str) -> None:
    refused(PlanError, said, pin=pins)


def test_an_impossible_role_says_why() -> None:
    refused(PlanError, "k_proj cannot be column: no grain", tiny_config("llama", num_key_value_heads=1),
            pin={"k_proj": "column"})  # fmt: skip
    refused(PlanError, "q_proj cannot be row: tp=1 cuts nothing", pin={"q_proj": "row"}, tp=1)


def test_pins_that_leave_no_plan_are_named_and_no_others() -> None:
    config = tiny_config("llama", tie_word_embeddings=False)
    free = adx.compile(config, tp=2, hardware="cpu-gloo").plan.stages[0].weight_bytes
    pins = {"q_proj": "column", "embed_tokens": "replicate", "lm_head": "replicate"}
    half = adx.compile(config, tp=2, hardware="cpu-gloo", pin={"lm_head": "replicate"}).plan.stages[0].weight_bytes
    limit = (half + free) // 2
    refused(NoPlanFits, r"the pin '(lm_head|embed_tokens)': replicate cannot be met: no cut", config, pin=pins,
            max_memory=limit)  # fmt: skip
    refused(NoPlanFits, r"together the pins 'embed_tokens': replicate, 'lm_head': replicate cannot", config, pin=pins,
            max_memory=half)  # fmt: skip
    refused(NoPlanFits, r"^no cut into 1 stages fits", config, pin=pins, max_memory=1000)


def test_blame_is_the_least_that_fails() -> None:
    pins = [(name, "row") for name in "abcd"]
    failing = ({"b", "d"}, {"a", "b", "c"})

    def fails(kept: object) -> bool:
        return any(bad <= {name for name, _ in kept} for bad in failing)  # type: ignore[attr-defined]

    assert to_blame(pins, fails) in ([("b", "row"), ("d", "row")], [("a", "row"), ("b", "row"), ("c", "row")])
    assert to_blame(pins, lambda kept: True) == []


@pytest.mark.parametrize(
    ("pp", "cuts", "said"),
    [
        (2, [1, 1], r"2 cuts given, and pp=2 has 1"),
        (3, [1, 1], r"cut 1 does not come after cut 1 in the order"),
        (3, ["model.norm", "model.layers.1"], r"cut 'model\.layers\.1' does not come after cut 'model\.norm'"),
        (2, [7], r"no layer 7 to cut at: there are model\.layers\.0 to 1"),
        (2, ["model.layer.1"], r"the model runs no such module; the nearest: model\.layers\.1"),
        (2, ["model.embed_tokens"], r"where the model begins, and no weights would be left before it"),
    ],
)
def test_cuts_that_cannot_be_are_named(pp: int, cuts: list[int | str], said: str) -> None:
    refused(PlanError, said, pp=pp, cuts=cuts)


def test_a_layer_number_that_two_lists_have_asks_for_a_name() -> None:
    two = torch.nn.Sequential(Stack([Mlp(), Mlp()]), Stack([Mlp(), Mlp()]))

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = two

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": self.right(self.left(x)["y"])["y"]}

    graph: OpGraph = op_graph_of(Two(), x=("B", "S", 8))
    request = PlanRequest(Mesh(1, 2), CPU_GLOO, cuts=(1,))
    with pytest.raises(PlanError, match=r"cut 1 could be left\.\w+\.1 or right\.\w+\.1: name the module"):
        plan(graph, request, model="m", fingerprint="f")


def test_a_given_stage_that_does_not_fit_is_named() -> None:
    refused(NoPlanFits, r"stage 1, from model\.layers\.1\S*, holds .* and its device 10\.0 KiB: move the cuts",
            pp=2, cuts=[1], max_memory=[10**9, 10240])  # fmt: skip
