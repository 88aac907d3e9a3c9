"""A plan in words and tables, plain text of at most 120 columns: what each stage does, holds, says, and costs.

Layers that are treated alike share a row, so that 80 layers read like one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from cost_model.hardware import PRESETS
from cost_model.op_graph import DTYPE_BYTES
from cost_model.placement import Layout
from cost_model.plan import Alternative, Hop, OpPlan, ParamPlan, PartitionPlan

WIDTH = 120
HOPS_SHOWN = 6  # tensors named of each border
RANGES_SHOWN = 4  # of layers named in one cell
UNBALANCED = 1.25  # times the mean of the stages: the slowest bounds a pipeline that is kept full
IDLE_WORTH_A_WORD = 0.01  # of the bytes of matmul weights, some ranks having no part of them
SHARE_EXPECTED = 0.9  # of the bytes of matmul weights, sharded: with less, tp is not what its user thinks
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class Section:
    """A part of what is said of a plan: a table whose first row is its header, lines under it, or both.

    Columns in `left` are aligned left, the others right; `flexible` is the one that may be broken to fit.
    """

    title: str
    rows: tuple[tuple[str, ...], ...] = ()
    lines: tuple[str, ...] = ()
    left: tuple[int, ...] = ()
    flexible: int | None = None
    indent: str = ""  # of a line's continuation


@dataclass(frozen=True, slots=True)
class LinearGroup:
    """Linears or embeddings that differ in their layer's number only: a role, a weight's shape and its layout."""

    label: str  # "model.layers.*.mlp.up_proj"
    role: str
    modules: tuple[str, ...]
    weights: tuple[ParamPlan, ...]  # of those whose weight is known
    layout: int  # of the weight, by position in PartitionPlan.layouts; -1 where each rank holds it whole
    local: str  # shape on each tp rank, "[384|192]x576"
    stages: tuple[int, ...]
    alternatives: tuple[Alternative, ...]  # of the first one

    @property
    def shape(self) -> str:
        """Of a whole weight, "1536x576"; "-" where it is not known."""
        return "x".join(map(str, self.weights[0].shape)) if self.weights else "-"


def plan_text(plan: PartitionPlan) -> str:
    """The whole plan: header, then `plan_sections`."""
    return sections_text(plan_header(plan), plan_sections(plan))


def sections_text(header: Sequence[str], sections: Iterable[Section]) -> str:
    """One under the other, in lines of at most WIDTH."""
    blocks = [header, *map(_section_lines, sections)]
    # Tables fit by themselves unless a name in a plan is absurd; then its line is cut rather than the page broken.
    return "\n\n".join("\n".join(part for line in lines for part in _fitted(line)) for lines in blocks)


def plan_sections(plan: PartitionPlan) -> list[Section]:
    """Stages, linears, collectives, hops, parameters, prediction and warnings; those that have something to say."""
    warnings = tuple("! " + warning for warning in all_warnings(plan))
    sections = [
        _stage_section(plan),
        _linear_section(plan),
        _collective_section(plan),
        Section("Sent between stages, bytes from one tp rank", lines=_hop_lines(plan), indent=" " * 8),
        _param_section(plan),
        Section("Prediction", lines=prediction_lines(plan)),
        Section("Warnings", lines=warnings, indent="  "),
    ]
    return [section for section in sections if section.rows or section.lines]


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
            limits = dict.fromkeys(bytes_text(plan.memory_of_stage(s.index)) for s in too_large)
            warnings.append(
                f"{what} {bytes_text(max(s.memory_bytes for s in too_large))} on a rank, a device has "
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


def _idle_warning(plan: PartitionPlan) -> list[str]:
    """Ranks that have no part of what the others share: more of them than a layer has heads, say."""
    matmuls = [p for p in plan.params if p.matmul]
    enough = IDLE_WORTH_A_WORD * sum(map(param_bytes, matmuls))
    groups: dict[tuple[str, int], list[ParamPlan]] = {}
    for p in matmuls:
        layout = plan.layout(p.layout)
        idle = 0 if layout is None else sum(not layout.local_size(rank) for rank in range(plan.mesh.tp))
        if idle:
            groups.setdefault((name_pattern(p.name.rpartition(".")[0]), idle), []).append(p)
    found = {key: params for key, params in groups.items() if sum(map(param_bytes, params)) >= enough}
    if not found:
        return []
    most = max(idle for _, idle in found)
    names = [pattern for pattern, idle in found if idle == most]
    rest = f" and {len(names) - RANGES_SHOWN} more" if len(names) > RANGES_SHOWN else ""
    return [
        f"{most} of {plan.mesh.tp} tp ranks have no part of {', '.join(names[:RANGES_SHOWN])}{rest}: there are fewer "
        f"pieces that must not be cut, heads say, than ranks; a smaller tp leaves no rank idle there"
    ]


def sharded_share(plan: PartitionPlan) -> float:
    """Share, 0.0 to 1.0, of the bytes of matmul weights that no rank holds whole; 1.0 when there are none."""
    total = sum(param_bytes(p) for p in plan.params if p.matmul)
    return sum(param_bytes(p) for p in plan.params if p.matmul and _is_sharded(plan, p)) / total if total else 1.0


def whole_device(plan: PartitionPlan) -> str:
    """What "one device" is, where it is more than one rank's: " with all 4 cores", where ranks share a CPU."""
    names = plan.hardware.split(", ")
    shares = any(name in PRESETS and PRESETS[name].ranks_share_device for name in names)
    return f" with all {plan.mesh.size} cores" if shares and len(names) == 1 and plan.mesh.size > 1 else ""


def whole_param_bytes(plan: PartitionPlan) -> int:
    """Bytes of all parameters, each once."""
    return sum(param_bytes(p) for p in plan.params)


# --- sections --------------------------------------------------------------------------------------------------------


def plan_header(plan: PartitionPlan) -> list[str]:
    """Two lines: what is split how, and its size."""
    ranks = f"{plan.mesh.size} rank{'s' if plan.mesh.size > 1 else ''}"
    sizes = ", ".join(f"{symbol}={length}" for symbol, length in plan.sizes)
    count = sum(prod(p.shape) for p in plan.params)
    return [
        f"{plan.model} on {plan.mesh} ({ranks} of {plan.hardware}), objective {plan.objective}",
        f"{count_text(count)} parameters, {bytes_text(whole_param_bytes(plan))}; {_ops(len(plan.ops))}; "
        f"predicted at {sizes or 'the traced sizes'}; graph {plan.fingerprint[:12]}",
    ]


def _stage_section(plan: PartitionPlan) -> Section:
    memory = ("weights", "KV", "activ.", "work", "total")
    rows = [("stage", "ranks", "layers", "compute", "comm", "FLOPs", *memory, "recomputes")]
    for s in plan.stages:
        first, last = s.index * plan.mesh.tp, (s.index + 1) * plan.mesh.tp - 1
        rows.append((
            str(s.index),
            f"{first}-{last}" if last > first else str(first),
            ", ".join(compress_names(s.layers)) or "-",
            seconds_text(s.compute_seconds),
            seconds_text(s.comm_seconds),
            count_text(s.flops),
            bytes_text(s.weight_bytes),
            bytes_text(s.kv_cache_bytes),
            bytes_text(s.activation_bytes),
            bytes_text(s.workspace_bytes),
            bytes_text(s.memory_bytes),
            _ops(len(s.recomputed)) if s.recomputed else "-",
        ))  # fmt: skip
    title = "Stages, one forward, each on its slowest tp rank"
    return Section(title, tuple(rows), left=(0, 1, 2), flexible=2)


def linear_groups(plan: PartitionPlan) -> list[LinearGroup]:
    """Every op with a role, in the plan's order; layers that are treated alike share a group."""
    params = {p.name: p for p in plan.params}
    groups: dict[tuple[str, str, str, int, str], list[tuple[OpPlan, ParamPlan | None]]] = {}
    for op in plan.ops:
        if not op.role:
            continue
        weight = weight_of(op, params)
        shape = "x".join(map(str, weight.shape)) if weight else "-"
        layout = weight.layout if weight else (*op.input_layouts, -1, -1)[1]
        key = (name_pattern(op.module or op.name), op.role, shape, layout, local_shape(plan, op, weight))
        groups.setdefault(key, []).append((op, weight))
    rows_of = Counter(pattern for pattern, *_ in groups)
    found = []
    for (pattern, role, _, layout, local), ops in groups.items():
        names = tuple(op.module or op.name for op, _ in ops)
        # A pattern in several rows: name the layers, or nobody could tell them apart.
        ranges = compress_names(names)
        label = names[0] if len(names) == 1 else pattern
        if rows_of[pattern] > 1 and len(ranges) <= RANGES_SHOWN:
            label = ", ".join(ranges)
        stages = tuple(sorted({stage for op, _ in ops for stage in op.stages}))
        weights = tuple(weight for _, weight in ops if weight)
        found.append(LinearGroup(label, role, names, weights, layout, local, stages, plan.alternatives(ops[0][0])))
    return found


def _linear_section(plan: PartitionPlan) -> Section:
    rows = [("module", "role", "times", "weight", "on each tp rank")]
    for group in linear_groups(plan):
        rows.append((group.label, group.role, f"x{len(group.modules)}", group.shape, group.local))
    return Section("Linears and embeddings", tuple(rows) if len(rows) > 1 else (), left=(0, 1, 3, 4), flexible=0)


def _collective_section(plan: PartitionPlan) -> Section:
    title = "Collectives in one forward, bytes of whole tensors"
    groups: dict[tuple[tuple[str, int, int], ...], list[int]] = {}
    for s in plan.stages:
        groups.setdefault(s.collectives, []).append(s.index)
    if not any(groups):
        return Section(title, lines=("none",))
    rows = [("stage", "collective", "times", "bytes")]
    total: dict[str, tuple[int, int]] = {}
    for collectives, stages in groups.items():
        label = "stages " + ranges_text(stages) + ", each" if len(stages) > 1 else f"stage {stages[0]}"
        for name, count, nbytes in collectives:
            rows.append((label, name, str(count), bytes_text(nbytes)))
            n, b = total.get(name, (0, 0))
            total[name] = n + count * len(stages), b + nbytes * len(stages)
    if len(plan.stages) > 1:
        rows += [("all stages", name, str(n), bytes_text(b)) for name, (n, b) in total.items()]
    return Section(title, tuple(rows), left=(0, 1))


def _hop_lines(plan: PartitionPlan) -> tuple[str, ...]:
    if plan.mesh.pp == 1:
        return ()
    borders: dict[tuple[int, int], list[Hop]] = {}
    for hop in plan.hops:
        borders.setdefault((hop.source, hop.target), []).append(hop)
    lines = []
    for (source, target), hops in sorted(borders.items()):
        hops = sorted(hops, key=lambda h: -h.nbytes)
        named = [_hop_text(plan, h) for h in hops[:HOPS_SHOWN]]
        if len(hops) > HOPS_SHOWN:
            rest = hops[HOPS_SHOWN:]
            named.append(f"and {len(rest)} more ({bytes_text(sum(h.nbytes for h in rest))})")
        lines.append(f"{source} -> {target}  {', '.join(named)}")
    return tuple(lines) or ("nothing",)


def _hop_text(plan: PartitionPlan, hop: Hop) -> str:
    name = hop.op if len(plan.op(hop.op).outputs) == 1 else f"{hop.op}[{hop.index}]"
    placement = plan.op(hop.op).outputs[hop.index]
    return f"{name} ({bytes_text(hop.nbytes)}{'' if hop.whole or placement.is_replicate else f', {placement}'})"


def _param_section(plan: PartitionPlan) -> Section:
    rows = [("", "whole", "sharded", "replicated", "share sharded")]
    for label, params in (
        ("weights of matmuls and embeddings", [p for p in plan.params if p.matmul]),
        ("norms, biases and others", [p for p in plan.params if not p.matmul]),
    ):
        total = sum(param_bytes(p) for p in params)
        sharded = sum(param_bytes(p) for p in params if _is_sharded(plan, p))
        share = f"{sharded / total:.1%}" if total else "-"
        rows.append((label, bytes_text(total), bytes_text(sharded), bytes_text(total - sharded), share))
    lines: tuple[str, ...] = ()
    tied = [p for p in plan.params if len(p.stages) > 1]
    if tied:
        names = ", ".join(f"{label} (stages {ranges_text(stages)})" for label, stages in _by_stages(tied))
        lines = (f"held by several stages: {names}",)
    return Section("Parameters", tuple(rows) if plan.mesh.tp > 1 else (), lines, left=(0,), indent="  ")


def prediction_lines(plan: PartitionPlan) -> tuple[str, ...]:
    compute, comm = sum(s.compute_seconds for s in plan.stages), sum(s.comm_seconds for s in plan.stages)
    total = plan.predicted_seconds
    share = f", {comm / total:.0%} of it communication" if total > 0 and plan.mesh.size > 1 else ""
    parts = f"compute {seconds_text(compute)}, communication {seconds_text(comm)}"
    lines = [f"one forward {seconds_text(total)} ({parts}){share}"]
    if plan.mesh.size > 1 and plan.one_device_seconds > 0 and total > 0:
        lines.append(
            f"one device  {seconds_text(plan.one_device_seconds)}{whole_device(plan)}: predicted speed-up "
            f"{plan.one_device_seconds / total:.2f} on {plan.mesh.size} ranks"
        )
    if plan.mesh.pp > 1 and total > 0:
        slowest = max(plan.stages, key=lambda s: s.seconds)
        lines.append(
            f"slowest stage {slowest.index} with {seconds_text(slowest.seconds)}: what bounds a pipeline kept full"
        )
    if plan.device_memory_bytes and plan.stages:
        fullest = max(plan.stages, key=lambda s: s.memory_bytes)
        lines.append(
            f"fullest stage {fullest.index} with {bytes_text(fullest.memory_bytes)} "
            f"of {bytes_text(plan.memory_of_stage(fullest.index))} a device"
        )
    return tuple(lines)


# --- weights ---------------------------------------------------------------------------------------------------------


def weight_of(op: OpPlan, params: dict[str, ParamPlan]) -> ParamPlan | None:
    """The op's weight: as the plan says, else the one matmul weight that its module owns."""
    if op.weight:
        return params.get(op.weight)
    return params.get(f"{op.module}.weight")


def local_shape(plan: PartitionPlan, op: OpPlan, weight: ParamPlan | None) -> str:
    """The weight's shape on each tp rank: "[320|256]x576", "288x576" where all are alike."""
    if weight is None:  # at least how the op wants its weight, which is its second input in every role
        placement, index = (op.inputs[1], op.input_layouts[1]) if len(op.input_layouts) > 1 else (None, -1)
        if placement is None or index < 0:
            return "-"
        return f"{placement} {_lengths(plan.layouts[index])}"
    dims = [str(n) for n in weight.shape]
    if weight.placement.is_owned:
        return "whole, on one rank each"
    if weight.layout >= 0:
        dims[weight.placement.dim] = _lengths(plan.layouts[weight.layout])
    return "x".join(dims)


def _lengths(layout: Layout) -> str:
    """Local lengths by rank, runs of equal ones as "3*320"."""
    runs: list[list[int]] = []
    for length in (layout.local_size(r) for r in range(len(layout.parts))):
        if runs and runs[-1][1] == length:
            runs[-1][0] += 1
        else:
            runs.append([1, length])
    if len(runs) == 1:
        return str(runs[0][1])
    return "[" + "|".join(f"{n}*{length}" if n > 2 else "|".join([str(length)] * n) for n, length in runs) + "]"


def param_bytes(param: ParamPlan) -> int:
    """Of the whole parameter."""
    return prod(param.shape) * DTYPE_BYTES.get(param.dtype, 4)


def _is_sharded(plan: PartitionPlan, param: ParamPlan) -> bool:
    """False also when a layout gives some rank everything."""
    if param.placement.is_owned:
        return True
    return param.layout >= 0 and plan.layouts[param.layout].max_local_size < plan.layouts[param.layout].size


def _by_stages(params: Iterable[ParamPlan]) -> list[tuple[str, tuple[int, ...]]]:
    groups: dict[tuple[int, ...], list[str]] = {}
    for p in params:
        groups.setdefault(p.stages, []).append(p.name)
    return [(", ".join(compress_names(names)), stages) for stages, names in groups.items()]


# --- names -----------------------------------------------------------------------------------------------------------


def name_pattern(name: str) -> str:
    """Numbers in a module path as stars: "model.layers.3.mlp" -> "model.layers.*.mlp"."""
    return _NUMBER.sub("*", name)


def compress_names(names: Iterable[str]) -> list[str]:
    """Names that differ in one number only, as ranges: h.0, h.1, h.3 -> ["h.0-1,3"]. First come, first listed."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for name in names:
        found = list(_NUMBER.finditer(name))
        if not found:
            groups.setdefault((name,), [])
            continue
        # The number that counts layers is the first; what stands behind it has to be equal.
        at = found[0]
        groups.setdefault((name[: at.start()], name[at.end() :]), []).append(int(at.group()))
    return [key[0] if len(key) == 1 else f"{key[0]}{ranges_text(numbers)}{key[1]}" for key, numbers in groups.items()]


def ranges_text(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 -> "0-2,5"."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _ops(count: int) -> str:
    return "1 op" if count == 1 else f"{count} ops"


# --- numbers ---------------------------------------------------------------------------------------------------------


def bytes_text(nbytes: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if nbytes < 1000 or unit == "EiB":  # 1000, so that no number has four digits
            break
        nbytes /= 1024
    return f"{nbytes:.0f} {unit}" if unit == "B" or nbytes >= 100 else f"{nbytes:.1f} {unit}"


def seconds_text(seconds: float) -> str:
    """0.0123 -> "12.3 ms"."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1 or unit == "us":
            break
    value = seconds * scale
    if value >= 1e5:
        return f"{value:.3g} {unit}"
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def count_text(count: float) -> str:
    """12.3e9 -> "12.3 G"."""
    for unit in ("", " k", " M", " G", " T", " P"):
        if count < 1000 or unit == " P":
            break
        count /= 1000
    return f"{count:.0f}{unit}" if 100 <= count < 1e5 or not unit else f"{count:.3g}{unit}"


# --- tables ----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Sequence[str]], left: Sequence[int] = (), flexible: int | None = None) -> list[str]:
    """Lines of a table whose first row is the header; columns in `left` are aligned left, the others right.

    Where the table would be wider than WIDTH, the column `flexible` is broken over several lines.
    """
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    gap = 2
    if flexible is not None:
        room = WIDTH - sum(widths) - gap * (len(widths) - 1) + widths[flexible]
        widths[flexible] = max(min(widths[flexible], room), 16)
    lines = []
    for number, row in enumerate(rows):
        pieces = _broken(row[flexible], widths[flexible]) if flexible is not None else [""]
        for k, piece in enumerate(pieces):
            cells = [piece if c == flexible else cell if k == 0 else "" for c, cell in enumerate(row)]
            padded = [cell.ljust(w) if c in left else cell.rjust(w) for c, (cell, w) in enumerate(zip(cells, widths))]
            lines.append((" " * gap).join(padded).rstrip())
        if number == 0:
            lines.append((" " * gap).join("-" * w for w in widths))
    return lines


def _broken(text: str, width: int) -> list[str]:
    """`text` in pieces of at most `width`, broken behind a comma, a dot or a blank where there is one."""
    pieces = []
    while len(text) > width:
        at = max(text.rfind(", ", 0, width) + 1, text.rfind(",", 0, width) + 1)
        if at <= 0:
            at = max(text.rfind(".", 0, width) + 1, text.rfind(" ", 0, width) + 1)
        at = at if at > 0 else width
        pieces.append(text[:at].rstrip())
        text = text[at:].lstrip()
    return [*pieces, text]


def _fitted(line: str) -> list[str]:
    return [line] if len(line) <= WIDTH else _wrapped(line, indent="  ")


def _wrapped(text: str, indent: str) -> list[str]:
    first, *rest = _broken_words(text, WIDTH, len(indent))
    return [first, *(indent + line for line in rest)]


def _broken_words(text: str, width: int, indent: int) -> list[str]:
    """Lines of whole words (a longer word is cut), all but the first `indent` shorter."""
    lines = [""]
    for word in text.split(" "):
        room = width - (indent if len(lines) > 1 else 0)
        if lines[-1] and len(lines[-1]) + 1 + len(word) > room:
            lines.append("")
            room = width - indent
        while len(word) > room:
            lines[-1] += word[: room - len(lines[-1])]
            word = word[room:]
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}" if lines[-1] else word
    return lines


def _section_lines(section: Section) -> list[str]:
    lines = [line for text in section.lines for line in _wrapped(text, section.indent)]
    rows = table(section.rows, section.left, section.flexible) if section.rows else []
    return [section.title, *rows, *lines]


__all__ = [
    "LinearGroup",
    "Section",
    "all_warnings",
    "bytes_text",
    "compress_names",
    "count_text",
    "linear_groups",
    "name_pattern",
    "param_bytes",
    "plan_header",
    "plan_sections",
    "plan_text",
    "local_shape",
    "plan_warnings",
    "prediction_lines",
    "ranges_text",
    "seconds_text",
    "sections_text",
    "sharded_share",
    "table",
    "weight_of",
    "whole_device",
    "whole_param_bytes",
]
