"""What to know before a plan is run: it does not fit, it is slower than one device, a stage holds the others up."""

from __future__ import annotations

from cost_model.plan import PartitionPlan
from cost_model.plan_weights import sharded_share, whole_param_bytes
from cost_model.wording import bytes_text, ranges_text, seconds_text

UNBALANCED = 1.25  # times the mean of the stages: the slowest bounds a pipeline that is kept full
SHARE_EXPECTED = 0.9  # of the bytes of matmul weights, sharded: with less, tp is not what its user thinks


def all_warnings(plan: PartitionPlan) -> list[str]:
    """`plan_warnings`, and what the plan itself carries; each once."""
    return list(dict.fromkeys([*plan_warnings(plan), *plan.warnings]))


def plan_warnings(plan: PartitionPlan) -> list[str]:
    """What to know before running the plan, a sentence each: it does not fit, it is slower than one device."""
    warnings = []
    if plan.device_memory_bytes:
        too_large = [s for s in plan.stages if s.memory_bytes > plan.memory_of_stage(s.index)]
        if too_large:
            stages = ranges_text(s.index for s in too_large)
            one, many = f"stage {stages} does not fit: it needs", f"stages {stages} do not fit: they need up to"
            what = one if len(too_large) == 1 else many
            warnings.append(
                f"{what} {bytes_text(max(s.memory_bytes for s in too_large))} on a rank, a device has "
                f"{bytes_text(plan.device_memory_bytes)}; more ranks, a smaller batch or a shorter sequence would help"
            )
    if plan.mesh.size > 1 and plan.predicted_seconds > plan.one_device_seconds > 0:
        ratio = plan.predicted_seconds / plan.one_device_seconds
        reason = (
            "; but one device does not hold the model"
            if plan.device_memory_bytes and whole_param_bytes(plan) > plan.device_memory_bytes
            else "; split for memory, or use fewer ranks"
        )
        warnings.append(
            f"the split is predicted slower than one device: {seconds_text(plan.predicted_seconds)} a forward on "
            f"{plan.mesh.size} ranks against {seconds_text(plan.one_device_seconds)} on one "
            f"({ratio:.2f} times as long){reason}"
        )
    mean = plan.predicted_seconds / len(plan.stages) if plan.stages else 0.0
    slowest = max(plan.stages, key=lambda s: s.seconds, default=None)
    if slowest is not None and mean > 0 and slowest.seconds > UNBALANCED * mean:
        warnings.append(
            f"the stages are unbalanced: stage {slowest.index} takes {seconds_text(slowest.seconds)}, the mean is "
            f"{seconds_text(mean)}; with several batches in flight the others wait for it"
        )
    share = sharded_share(plan)
    if plan.mesh.tp > 1 and share < SHARE_EXPECTED:
        warnings.append(
            f"only {share:.0%} of the bytes of matmul weights are sharded; each tp rank holds the rest whole (role "
            f"replicate)"
        )
    return warnings
