"""Says what a plan predicts of a step of generating, beside what it took."""

from __future__ import annotations

from cost_model.costs.hardware import MEASURED
from cost_model.partition_plan import PartitionPlan


def forecast_text(plan: PartitionPlan | None, sequences: int) -> str:
    """Format the milliseconds of a step of so many sequences, " (predicted 41.2 behind 512)": the cached tokens that
    the plan is made for. Return "" for a plan of another number of sequences, for one of whole sequences, and for a
    preset, which is not this machine."""
    if plan is None or not plan.hardware.startswith(MEASURED):
        return ""
    sizes = dict(plan.sizes)
    if (sizes.get("B"), sizes.get("S", 1)) != (sequences, 1) or "P" not in sizes:
        return ""
    return f" (predicted {plan.predicted_seconds * 1e3:.1f} behind {sizes['P']})"
