"""Warnings before a plan is run: it does not fit, it is slower than one device, a stage holds the others up."""

from __future__ import annotations

from cost_model.costs.hardware import shares_cpu
from cost_model.format import bytes_text, name_pattern, ranges_text, seconds_text
from cost_model.plan.data import ParamPlan, PlanData
from cost_model.plan.weights import param_bytes, sharded_share, whole_param_bytes

UNBALANCED = 1.25  # times the stages' mean seconds: the slowest stage bounds a pipeline that is kept full
IDLE_WORTH_A_WORD = 0.01  # share of the bytes of matmul weights of which some ranks have no part: with less, no word
IDLE_NAMED = 4  # modules named in that warning
SHARE_EXPECTED = 0.9  # share of the bytes of matmul weights that is sharded: with less, tp is not what users expect


def all_warnings(plan: PlanData) -> list[str]:
    """Returns `plan_warnings` and the warnings that the plan itself carries, each once."""
    return list(dict.fromkeys([*plan_warnings(plan), *plan.warnings]))


def plan_warnings(plan: PlanData) -> list[str]:
    """Returns the warnings that follow from a plan's values, one sentence each."""
    warnings = []
    if plan.device_memory_bytes:
        too_large = [s for s in plan.stages if s.memory_bytes > plan.memory_of_stage(s.index)]
        if too_large:
            stages = ranges_text(s.index for s in too_large)
            singular, plural = f"stage {stages} does not fit: it needs", f"stages {stages} do not fit: they need up to"
            subject = singular if len(too_large) == 1 else plural
            limits = dict.fromkeys(bytes_text(plan.memory_of_stage(s.index)) for s in too_large)
            warnings.append(
                f"{subject} {bytes_text(max(s.memory_bytes for s in too_large))} on a rank, a device has "
                f"{' or '.join(limits)}; more ranks, a smaller batch or a shorter sequence would help"
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
            f"{plan.mesh.size} ranks against {seconds_text(plan.one_device_seconds)} on one{whole_device(plan)} "
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
    return warnings + _idle_warning(plan)


def _idle_warning(plan: PlanData) -> list[str]:
    """Warns of ranks that have no part of weights that the others share: there are more ranks than heads, say."""
    matmuls = [p for p in plan.params if p.matmul]
    enough = IDLE_WORTH_A_WORD * sum(map(param_bytes, matmuls))
    groups: dict[tuple[str, int], list[ParamPlan]] = {}
    for p in matmuls:
        layout = plan.layout(p.layout)
        idle = 0 if layout is None else sum(not layout.local_size(rank) for rank in range(plan.mesh.tp))
        if idle:
            groups.setdefault((name_pattern(p.name.rpartition(".")[0]), idle), []).append(p)
    worth_saying = {key: params for key, params in groups.items() if sum(map(param_bytes, params)) >= enough}
    if not worth_saying:
        return []
    most = max(idle for _, idle in worth_saying)
    names = [pattern for pattern, idle in worth_saying if idle == most]
    rest = f" and {len(names) - IDLE_NAMED} more" if len(names) > IDLE_NAMED else ""
    return [
        f"{most} of {plan.mesh.tp} tp ranks have no part of {', '.join(names[:IDLE_NAMED])}{rest}: there are fewer "
        f"pieces that must not be cut, heads say, than ranks; a smaller tp leaves no rank idle there"
    ]


def whole_device(plan: PlanData) -> str:
    """Returns what a message adds to "one device": " with 4 cores" where the ranks share a CPU, a core for each
    rank, else ""."""
    names = plan.hardware.split(", ")
    shares = any(shares_cpu(name) for name in names)
    return f" with {plan.mesh.size} cores" if shares and len(names) == 1 and plan.mesh.size > 1 else ""
