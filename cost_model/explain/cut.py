"""Explains why the pipeline is cut where it is: what the stages on both sides would take at the places next to it."""

from __future__ import annotations

from typing import Any

from cost_model.errors import PlanError
from cost_model.format import bytes_text, seconds_text
from cost_model.plan.data import CutOption, CutPlan, Hop, PlanData
from cost_model.text_tables import Section


def cut_facts(plan: PlanData, cut: int) -> dict[str, Any]:
    """Returns what `cut_section` says, as JSON-ready values. Raises PlanError when the plan has no such cut."""
    border = _cut(plan, cut)
    return {
        "cut": cut,
        "options": [
            {
                "op": o.op, "module": o.module, "chosen": k == border.chosen, "before_seconds": o.before_seconds,
                "after_seconds": o.after_seconds, "nbytes": o.nbytes,
            }
            for k, o in enumerate(border.options)
        ],
        "sent": [
            {"op": h.op, "source": h.source, "target": h.target, "nbytes": h.nbytes} for h in _crossing(plan, cut)
        ],
        "why": cut_reason(plan, cut),
    }  # fmt: skip


def cut_section(plan: PlanData, cut: int) -> Section:
    """Returns the section on the cut behind stage `cut`. Raises PlanError when the plan has no such cut."""
    border = _cut(plan, cut)
    rows = [("stage " + str(cut + 1) + " begins with", "", f"stage {cut}", f"stage {cut + 1}", "slower", "crosses")]
    for k, o in enumerate(border.options):
        rows.append((
            f"{o.module} ({o.op})" if o.module else o.op,
            "chosen" if k == border.chosen else "",
            seconds_text(o.before_seconds),
            seconds_text(o.after_seconds),
            seconds_text(_slower(o)),
            bytes_text(o.nbytes),
        ))  # fmt: skip
    sent = [f"{h.op} ({h.source} -> {h.target}, {bytes_text(h.nbytes)})" for h in _crossing(plan, cut)]
    lines = (
        f"why here: {cut_reason(plan, cut)}",
        f"sent across, bytes from each tp rank: {', '.join(sent) or 'nothing'}",
    )
    title = f"Cut {cut}, between stages {cut} and {cut + 1}: the places next to it, the other cuts staying"
    return Section(title, tuple(rows), lines, left=(0, 1), flexible=0, indent="  ")


def cut_reason(plan: PlanData, cut: int) -> str:
    """Returns the reason for a cut in one sentence, from the figures of the places next to it."""
    border = _cut(plan, cut)
    here = border.options[border.chosen]
    others = [o for k, o in enumerate(border.options) if k != border.chosen]
    if not others:
        return "there is no other place between the cuts next to it"
    best = min(others, key=lambda o: (_slower(o), o.nbytes))
    if _slower(here) < _slower(best):
        return (
            f"the slower of the two stages takes {seconds_text(_slower(here))}, and at least "
            f"{seconds_text(_slower(best))} at any place next to it"
        )
    if _slower(here) == _slower(best) and here.nbytes < best.nbytes:
        return f"as fast as at {best.op}, and fewer bytes cross"
    slowest = max(plan.stages, key=lambda s: s.seconds)
    between = "" if slowest.index in (cut, cut + 1) else f", which is stage {slowest.index},"
    less = _slower(here) - _slower(best)
    gain = f"take {seconds_text(less)} less" if less else "be as fast"
    return (
        f"at {best.op} the slower of the two would {gain}; but the slowest of all stages{between} counts, "
        f"then the bytes over all borders, and each stage must fit its device"
    )


def _slower(option: CutOption) -> float:
    return max(option.before_seconds, option.after_seconds)


def _cut(plan: PlanData, cut: int) -> CutPlan:
    if not plan.cuts:
        raise PlanError("the plan has no cuts: it is of one stage" if plan.mesh.pp == 1 else "the plan says no cuts")
    if not 0 <= cut < len(plan.cuts):
        have = f"cuts 0 to {len(plan.cuts) - 1}" if len(plan.cuts) > 1 else "cut 0 only"
        raise PlanError(f"no cut {cut}: a plan of {plan.mesh.pp} stages has {have}")
    return plan.cuts[cut]


def _crossing(plan: PlanData, cut: int) -> list[Hop]:
    return [h for h in plan.hops if h.source <= cut < h.target]
