"""Writes and reads a measured machine as JSON: peak rates, tables, links. `autodist-fx measure` makes such files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cost_model.costs.compute import ATTENTION, GROUPED_ATTENTION, PRODUCT
from cost_model.costs.hardware import MEASURED, Hardware, Link, hardware
from cost_model.costs.measured import Measured, Run
from cost_model.costs.tables import Table
from cost_model.errors import PlanError, reason_text
from cost_model.plan.json_fields import Fields, list_of, number_of, type_name

HARDWARE_VERSION = 1
SUFFIX = ".json"
_NEEDED = ("linear", "sdpa", "add", "silu", "cat", "embedding", "view")  # kinds that stand for all others
_WAY_OUT = "measure the machine again, by `autodist-fx measure`"


@dataclass(frozen=True, slots=True)
class About:
    """Where and when a machine was measured, for people."""

    measured: str  # a date
    processor: str
    torch: str


def named_hardware(name: str | Hardware) -> Hardware:
    """Returns the preset of a name, or the measured machine of a file, whose name ends in ".json"; a Hardware is passed
    through. Raises PlanError for any other name, and for a file that cannot be read."""
    if isinstance(name, str) and name.endswith(SUFFIX):
        return load_hardware(name)[0]
    if isinstance(name, str) and name.startswith(MEASURED):
        raise PlanError(f"{name} was measured on some machine: name its file, which `autodist-fx measure --save` wrote")
    return hardware(name)


def save_hardware(machine: Hardware, about: About, path: str | Path) -> None:
    """Writes a measured machine, whole or not at all. Raises PlanError where that fails."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.tmp")
        beside.write_text(hardware_to_text(machine, about), encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise PlanError(f"cannot write the measured machine to {path}: {reason_text(error)}") from error


def load_hardware(path: str | Path) -> tuple[Hardware, About]:
    """Reads a measured machine. Raises PlanError naming the file and the field for one that is damaged."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"cannot read the measured machine {path}: {reason_text(error)}") from error
    try:
        return hardware_from_data(data)
    except PlanError as error:
        raise PlanError(f"{path} is no measured machine: {error}; {_WAY_OUT}") from error


def hardware_to_text(machine: Hardware, about: About) -> str:
    """Returns a measured machine as JSON, a table a line."""
    assert machine.measured is not None
    head = {
        "version": HARDWARE_VERSION,
        "name": machine.name,
        "measured": about.measured,
        "processor": about.processor,
        "torch": about.torch,
        "flops": dict(machine.flops),
        "memory_bandwidth": machine.memory_bandwidth,
        "memory_bytes": machine.memory_bytes,
        "ranks_per_node": machine.ranks_per_node,
        "dispatches_ahead": machine.dispatches_ahead,
        "fuses_norms": machine.fuses_norms,
        "ranks_share_device": machine.ranks_share_device,
        "cores": machine.measured.cores,
        "node_factor": machine.measured.node_factor,
        "step_seconds": machine.measured.step_seconds,
        "start_seconds": machine.measured.start_seconds,
    }
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    lines += [f'  "{name}": {_link_text(link)}' for name, link in _links(machine).items()]
    runs = [f'    {{"ranks": {run.ranks}, "tables": {_tables_text(run.tables)}}}' for run in machine.measured.runs]
    lines.append('  "runs": [\n' + ",\n".join(runs) + "\n  ]")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def hardware_from_data(data: object) -> tuple[Hardware, About]:
    """Reads a measured machine from JSON values. Raises PlanError naming the field for what is malformed."""
    if not isinstance(data, Mapping):
        raise PlanError(f"it is a JSON object, not {type_name(data)}")
    top = Fields(data, "")
    version = top.integer("version")
    if version != HARDWARE_VERSION:
        raise PlanError(f"version: this autodist_fx reads version {HARDWARE_VERSION}, not {version}")
    about = About(top.text("measured"), top.text("processor"), top.text("torch"))
    rates = top.object("flops")
    flops = tuple((dtype, _above_zero(rates, dtype)) for dtype in rates.data)
    if "float32" not in rates.data:
        raise rates.error("float32", "missing")
    measured = Measured(
        cores=top.integer("cores"),
        runs=tuple(top.objects("runs", _run)),
        node_factor=_above_zero(top, "node_factor"),
        step_seconds=top.number("step_seconds"),
        start_seconds=top.number("start_seconds"),
    )
    if [run.ranks for run in measured.runs] != sorted({run.ranks for run in measured.runs}) or not measured.runs:
        raise top.error("runs", "expected one or more, by ascending ranks")
    machine = Hardware(
        name=top.text("name"),
        flops=flops,
        memory_bandwidth=_above_zero(top, "memory_bandwidth"),
        memory_bytes=top.integer("memory_bytes", low=1),
        op_seconds=0.0,  # these two follow from the tables, below
        view_seconds=0.0,
        tp_link=_link(top.object("tp_link")),
        pp_link=_link(top.object("pp_link")),
        ranks_per_node=top.integer("ranks_per_node", low=1),
        inter_node=_link(top.object("inter_node")),
        dispatches_ahead=top.flag("dispatches_ahead"),
        fuses_norms=top.flag("fuses_norms"),
        ranks_share_device=top.flag("ranks_share_device"),
        measured=measured,
    )
    top.done()
    return machine.computing(measured.runs[0].ranks), about


def _run(f: Fields) -> Run:
    run = Run(f.integer("ranks", low=1), tuple(f.objects("tables", lambda each: _table(each, is_message=False))))
    if missing := [kind for kind in _NEEDED if all(table.kind != kind for table in run.tables)]:
        raise f.error("tables", f"there is none of {missing[0]}")
    f.done()
    return run


def _table(f: Fields, *, is_message: bool) -> Table:
    axes = tuple(_numbers(axis, f.path(f"axes[{i}]")) for i, axis in enumerate(f.items("axes")))
    seconds = _numbers(f.data.get("seconds"), f.path("seconds"))
    f.items("seconds")
    try:
        found = Table(f.text("kind"), f.text("dtype"), axes, seconds, f.number("fixed_seconds"))
    except ValueError as error:
        raise f.error("seconds", str(error)) from error
    dims = 2 if is_message else 3 if found.kind in (PRODUCT, ATTENTION, GROUPED_ATTENTION) else 1
    if len(found.axes) != dims:
        raise f.error("axes", f"{len(found.axes)} for {found.kind}; expected {dims}")
    f.done()
    return found


def _link(f: Fields) -> Link:
    found = Link(
        latency_seconds=f.number("latency_seconds"),
        bandwidth=_above_zero(f, "bandwidth"),
        launch_seconds=f.number("launch_seconds"),
        tree=f.flag("tree"),
        tables=tuple(f.objects("tables", lambda each: _table(each, is_message=True))),
    )
    f.done()
    return found


def _above_zero(f: Fields, key: str) -> float:
    value = f.number(key)
    if not value:
        raise f.error(key, "expected a number above 0")
    return value


def _numbers(value: Any, path: str) -> tuple[float, ...]:
    return tuple(number_of(x, f"{path}[{i}]") for i, x in enumerate(list_of(value, path)))


def _links(machine: Hardware) -> dict[str, Link]:
    return {"tp_link": machine.tp_link, "pp_link": machine.pp_link, "inter_node": machine.inter_node}


def _link_text(link: Link) -> str:
    plain = {
        "latency_seconds": link.latency_seconds,
        "bandwidth": link.bandwidth,
        "launch_seconds": link.launch_seconds,
        "tree": link.tree,
    }
    return json.dumps(plain)[:-1] + f', "tables": {_tables_text(link.tables)}}}'


def _tables_text(tables: tuple[Table, ...]) -> str:
    lines = [
        json.dumps({
            "kind": table.kind,
            "dtype": table.dtype,
            "axes": table.axes,
            "seconds": table.seconds,
            "fixed_seconds": table.fixed_seconds,
        })
        for table in tables
    ]  # fmt: skip
    return "[\n      " + ",\n      ".join(lines) + "\n    ]" if lines else "[]"
