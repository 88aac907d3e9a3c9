"""A plan names ops without a sharding rule, and strict refuses it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import cost_model.rules.table
from cost_model.errors import PlanError
from cost_model.explain.breakdown import whole_sections
from cost_model.explain.op import op_sections
from cost_model.plan.missing_rules import MissingRule, missing_rules, refuse_missing_rules
from cost_model.rules import views
from cost_model.rules.table import RULES
from cost_model.text_tables import sections_text
from passes.op_graph.build import build_op_graph
from tests.support.graphs.small import Attention, normalized, plan_for

Between = Callable[[torch.Tensor], torch.Tensor]


class Mlp(nn.Module):
    """Two linears, 8 -> 12 -> 8, with a function of [B, S, 12] between them; `layers` times."""

    def __init__(self, between: Between, layers: int = 1) -> None:
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(8, 12) for _ in range(layers))
        self.downs = nn.ModuleList(nn.Linear(12, 8) for _ in range(layers))
        self.between = between

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        for up, down in zip(self.ups, self.downs):
            x = x + down(self.between(up(x)))
        return {"y": x}


def missing_in(between: Between, layers: int = 1, tp: int = 2) -> tuple[MissingRule, ...]:
    whole = normalized(Mlp(between, layers), x=("B", "S", 8))
    return missing_rules(build_op_graph(whole), plan_for(whole, tp=tp))


def unknown(x: torch.Tensor) -> torch.Tensor:
    return torch.special.erfcx(x)


def test_an_op_without_a_rule_costs_its_seconds_and_the_collective_in_front_of_it() -> None:
    whole = normalized(Mlp(unknown, layers=3), x=("B", "S", 8))
    graph, plan = build_op_graph(whole), plan_for(whole, tp=2)
    (missing,) = missing_rules(graph, plan)
    ops = [op for op in plan.ops if op.kind == "opaque.special_erfcx"]
    assert (missing.kind, missing.ops) == ("special_erfcx", tuple(op.name for op in ops))
    assert len(ops) == 3 and all(p.is_replicate for op in ops for p in (*op.inputs, *op.outputs))
    assert missing.compute_seconds > 0
    assert missing.compute_seconds == pytest.approx(sum(op.compute_seconds for op in ops))
    # each up is column or row parallel, and made whole for it: [1, 128, 12] of float64
    ups = [op for op in plan.ops if op.role in ("column", "row") and op.module.startswith("ups")]
    assert missing.collectives == len(ups) == 3 and all(op.gather == (True,) for op in ups)
    assert missing.comm_bytes == 3 * 128 * 12 * 8
    assert missing.comm_seconds > 0
    assert missing.comm_seconds == pytest.approx(sum(op.comm_seconds for op in ups))


def test_with_a_rule_nothing_is_missing_and_without_ranks_nothing_is_lost() -> None:
    assert missing_in(torch.nn.functional.silu) == ()
    assert missing_in(unknown, tp=1) == ()


def test_what_another_op_reads_whole_is_not_counted_as_its_collective() -> None:
    (missing,) = missing_in(lambda x: unknown(x) + x.softmax(-1))
    assert (missing.collectives, missing.comm_bytes, missing.comm_seconds) == (0, 0, 0.0)


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x + torch.zeros_like(x),  # whole on purpose
        lambda x: x + torch.special.erfcx(x.new_ones(12)),  # made of a length alone
        lambda x: x * torch.special.erfcx(x).topk(12)[0],  # decides, and is whole whatever its rule
    ],
    ids=["fill", "of a fill", "router"],
)
def test_what_no_rule_would_change_is_not_counted(between: Between) -> None:
    assert missing_in(between) == ()


def test_a_plan_carries_it_as_a_warning_and_explain_shows_it() -> None:
    plan = plan_for(normalized(Mlp(unknown, layers=2), x=("B", "S", 8)), tp=2)
    (warning,) = [text for text in plan.warnings if "no sharding rule" in text]
    assert "special_erfcx" in warning and "2 ops" in warning and "2 collectives" in warning
    assert warning.endswith("add a row to cost_model/rules")
    assert warning.partition(";")[0] in " ".join(sections_text([], whole_sections(plan)).split())
    op = next(op for op in plan.ops if op.kind == "opaque.special_erfcx")
    assert "none for special_erfcx" in sections_text([], op_sections(plan, [op]))


def test_strict_refuses_and_names_kinds_and_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = normalized(Attention(12, 4, 2), x=("B", "S", 12))
    graph, plan = build_op_graph(whole), plan_for(whole, tp=2)
    refuse_missing_rules(graph, plan)
    rest = {kind: rule for kind, rule in RULES.items() if kind not in views.RULES}
    monkeypatch.setattr(cost_model.rules.table, "RULES", rest)
    with pytest.raises(PlanError, match=r"no sharding rule for .*view.*add a row to cost_model/rules"):
        refuse_missing_rules(graph, plan_for(whole, tp=2))
