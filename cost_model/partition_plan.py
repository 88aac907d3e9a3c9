"""`PartitionPlan`, the plan that users hold: the values of PlanData, which print, compare, save and load themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cost_model.errors import PlanError, reason_text
from cost_model.explain.diff import PlanDiff, diff_plans
from cost_model.explain.html import plan_fragment
from cost_model.explain.plan_text import plan_text
from cost_model.plan.data import PlanData
from cost_model.plan.read_json import plan_from_dict, plan_from_text
from cost_model.plan.write_json import plan_to_dict, plan_to_text


@dataclass(frozen=True, slots=True)
class PartitionPlan(PlanData):
    """A partition plan: every decision that `compile` makes, as frozen values."""

    def __str__(self) -> str:
        return plan_text(self)

    def _repr_html_(self) -> str:
        """Returns HTML for notebooks: stages, prediction and warnings; linears, collectives and hops to unfold."""
        return plan_fragment(self)

    def diff(self, after: PartitionPlan) -> PlanDiff:
        """Returns what differs in `after`. Raises PlanError when `after` is a plan of another model."""
        return diff_plans(self, after)

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON-ready dicts, lists, texts and numbers."""
        return plan_to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PartitionPlan:
        """Reads what `to_dict` returned. Raises PlanError naming the field that is missing, unknown or malformed."""
        return plan_from_dict(data, cls)

    def save(self, path: str | Path) -> None:
        """Writes the plan to a JSON file. Raises PlanError when the file cannot be written."""
        text = plan_to_text(self)
        try:
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise PlanError(f"cannot write the plan file {path}: {reason_text(error)}") from error

    @classmethod
    def load(cls, path: str | Path) -> PartitionPlan:
        """Reads a plan file. Raises PlanError when it cannot be read, or naming the field when it is no plan."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read the plan file {path}: {reason_text(error)}") from error
        try:
            return plan_from_text(text, cls)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error
