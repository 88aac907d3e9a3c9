"""Every plan that a test of the families makes is also written as JSON and read back."""

from __future__ import annotations

from typing import Any

import pytest

import autodist_fx.compiler.variant
from cost_model.partition_plan import PartitionPlan
from cost_model.plan.read_json import plan_from_text
from cost_model.plan.write_json import plan_to_text


@pytest.fixture(autouse=True)
def _plans_read_back_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    make = autodist_fx.compiler.variant.make_plan

    def make_and_read_back(*args: Any, **options: Any) -> PartitionPlan:
        plan = make(*args, **options)
        assert plan_from_text(plan_to_text(plan), PartitionPlan) == plan
        return plan

    monkeypatch.setattr(autodist_fx.compiler.variant, "make_plan", make_and_read_back)
