"""Lists the tensors that cross each border between stages, why
each is sent, and the ops that are computed again instead."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from xml.etree.ElementTree import Element

from autodist_fx.report.html_parts import STAGES_SHOWN, cell, left_out, name, note, section, show_name, table
from cost_model.explain.cut import cut_reason
from cost_model.explain.html import element
from cost_model.format import bytes_text, ranges_text, seconds_text
from cost_model.partition_plan import PartitionPlan
from cost_model.plan.data import OpPlan

TENSORS_SHOWN = 200  # rows of the table
OPTIONS_SHOWN = 7  # places next to one cut
KINDS_SHOWN = 8  # kinds of ops computed again in one stage
NAMES_SHOWN = 24  # names of ops computed again in one stage
CACHE_KIND = "cache_update"


@dataclass(frozen=True, slots=True)
class Sent:
    """One tensor on its way from stage `source` to one or several later stages, whole or as each rank's shard."""

    op: OpPlan
    label: str
    source: int
    targets: tuple[int, ...]
    whole: bool
    nbytes: int  # from one tp rank to one stage


def sent_tensors(plan: PartitionPlan) -> list[Sent]:
    """Collect the plan's hops, in its order; hops of one tensor to several stages become one entry."""
    groups: dict[tuple[str, int, int, bool, int], list[int]] = {}
    for hop in plan.hops:
        groups.setdefault((hop.op, hop.index, hop.source, hop.whole, hop.nbytes), []).append(hop.target)
    found = []
    for (op_name, index, source, whole, nbytes), targets in groups.items():
        op = plan.op(op_name)
        label = op_name if len(op.outputs) == 1 else f"{op_name}[{index}]"
        found.append(Sent(op, label, source, tuple(sorted(set(targets))), whole or op.outputs[index].is_replicate,
                          nbytes))  # fmt: skip
    return found


def crossing(sent: list[Sent], before: int) -> list[Sent]:
    """Return the tensors that cross the border behind stage
    `before`, largest first, with only their targets behind it."""
    over = []
    for tensor in sent:
        targets = tuple(k for k in tensor.targets if k > before)
        if tensor.source <= before and targets:
            over.append(replace(tensor, targets=targets))
    return sorted(over, key=lambda tensor: -tensor.nbytes)


def bytes_of(sent: list[Sent]) -> int:
    """Sum the bytes that one tp rank sends; a tensor for two stages is sent twice."""
    return sum(tensor.nbytes * len(tensor.targets) for tensor in sent)


def why_sent(op: OpPlan) -> str:
    """Explain why a stage receives the op's output and does not
    recompute it (cost_model/search/pipeline.py decides)."""
    if op.kind == CACHE_KIND:
        return "it writes the KV cache, which is done once"
    if op.weight or op.role:
        return "it reads weights, which its own stage alone holds"
    if any(op.gather):
        return "a collective makes it whole, and collectives run once"
    return "computing it again would need more seconds, or inputs that cost more to send"


def borders_section(plan: PartitionPlan) -> Element | None:
    """Build the section "What crosses between stages"; None for a single stage."""
    if plan.mesh.pp == 1:
        return None
    sent = sent_tensors(plan)
    rows = [
        element(
            "tr",
            cell(f"{x.source} → {ranges_text(x.targets)}", x.source, "nowrap"),
            cell(name(x.label)),
            cell(_made_by(x.op)),
            cell(bytes_text(x.nbytes), x.nbytes, "num"),
            cell("whole" if x.whole else "each rank's part", cls="nowrap"),
            cell(why_sent(x.op), cls="words"),
        )
        for x in sent[:TENSORS_SHOWN]
    ]
    header = [("Stages", ""), ("Tensor", ""), ("Made by", ""), ("From a tp rank", "num"), ("Form", "nowrap"),
              ("Sent, because", "")]  # fmt: skip
    again = [_recomputed(plan, k) for k in range(min(len(plan.stages), STAGES_SHOWN)) if plan.stages[k].recomputed]
    return section(
        "borders",
        "Borders",
        "What crosses between stages",
        table(header, rows, "Tensors sent between stages") if rows else note("Nothing is sent."),
        left_out(len(sent), TENSORS_SHOWN, "tensors"),
        *_cuts(plan),
        element("h3", "Computed again instead of being sent") if again else None,
        note("Costs fewer seconds than sending, or cannot be sent, as a plain number.") if again else None,
        *again,
    )


def _cuts(plan: PartitionPlan) -> list[Element]:
    """Build, for each cut, its place and reason, and a fold-out
    with the stages' predicted seconds at the places next to it."""
    if not plan.cuts:
        return []
    parts = [element("h3", "Why the cuts are where they are"),
             note("Seconds of a stage, receiving and computing again among them; bytes of whole tensors.")]  # fmt: skip
    header = [("Cut before", ""), ("Stage in front", "num"), ("Stage behind", "num"), ("Slower of both", "num"),
              ("Crosses", "num"), ("", "")]  # fmt: skip
    for border, cut in enumerate(plan.cuts[:STAGES_SHOWN]):
        rows = []
        for i, option in enumerate(cut.options[:OPTIONS_SHOWN]):
            seconds = (option.before_seconds, option.after_seconds, max(option.before_seconds, option.after_seconds))
            rows.append(
                element(
                    "tr",
                    cell(name(option.module or option.op)),
                    *(cell(seconds_text(s), cls="num") for s in seconds),
                    cell(bytes_text(option.nbytes), cls="num"),
                    cell("cut here" if i == cut.chosen else "", cls="nowrap strong"),
                    cls="chosen" if i == cut.chosen else None,
                )
            )
        here = cut.options[cut.chosen]
        summary = element("summary", f"{border} | {border + 1}: before ", name(here.module or here.op), ": ",
                          show_name(cut_reason(plan, border), 400))  # fmt: skip
        parts.append(element("details", summary, table(header, rows, f"Places next to cut {border}")))
    return parts


def _made_by(op: OpPlan) -> Element:
    """Name the kind and module of the op that makes a tensor."""
    kind = show_name(op.kind, 40)
    return element("span", f"{kind} in ", name(op.module)) if op.module else element("span", kind)


def _recomputed(plan: PartitionPlan, stage: int) -> Element:
    """Build a fold-out of the ops that a stage computes again."""
    names = plan.stages[stage].recomputed
    kinds = Counter(plan.op(op).kind for op in names)
    said = [show_name(kind, 40) + (f" ×{n}" if n > 1 else "") for kind, n in kinds.most_common(KINDS_SHOWN)]
    if len(kinds) > KINDS_SHOWN:
        said.append("…")
    listed: list[Element | str] = []
    for op in names[:NAMES_SHOWN]:
        listed += [name(op), " "]
    more = f"and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else None
    ops = "1 op" if len(names) == 1 else f"{len(names)} ops"
    return element(
        "details",
        element("summary", f"stage {stage}: {ops} ({', '.join(said)})"),
        element("p", *listed, more, cls="names"),
    )
