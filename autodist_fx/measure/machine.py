"""`measure_machine`: starts the ranks that measure, and makes a Hardware of what they found."""

from __future__ import annotations

import datetime
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from autodist_fx.errors import AutodistError
from autodist_fx.measure.program import measure_program
from autodist_fx.runtime.comm.launch import launch_local
from autodist_fx.runtime.default_hardware import cores, machine_name, processor_name
from cost_model.costs.compute import PRODUCT, STREAM
from cost_model.costs.hardware import CPU_GLOO, GENERIC, Hardware, Link
from cost_model.costs.measured import Measured, Run
from cost_model.costs.tables import Table
from cost_model.request.hardware_file import About

_LEAST_SECONDS = 1e-7  # of work: less, no clock tells from nothing
_MOST_RANKS = 8  # by default, of a machine with more cores: the ranks then have several each


def default_ranks(device: str) -> int:
    """Return how many ranks a machine is measured with where nobody says: one for each core or GPU, but for many."""
    return torch.cuda.device_count() if device == "cuda" else min(cores(), _MOST_RANKS)


def measure_machine(device: str, ranks: int, *, quick: bool = False) -> tuple[Hardware, About]:
    """Measure this machine with one rank, then with `ranks` at once; the progress is shown on stderr.

    device: "cpu", or "cuda" with a GPU for each rank; `quick`: at few sizes. Raises AutodistError where a rank failed,
    which stderr says more of.
    """
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "results.json"
        command = [sys.executable, "-m", "autodist_fx.measure.rank", "--device", device, "--results", str(results)]
        command += ["--quick"] if quick else []
        code = launch_local(command, ranks)
        if code == 130:
            raise KeyboardInterrupt
        if code:
            raise AutodistError(f"a rank that measured ended with exit code {code}: stderr says why")
        found = json.loads(results.read_text())
    machine = _hardware(device, ranks, found)
    measured = measure_program(machine, device)
    machine = replace(machine, measured=measured).computing(1)
    about = About(datetime.date.today().isoformat(), processor_name(device), torch.__version__)
    return machine, about


def _hardware(device: str, ranks: int, found: dict[str, Any]) -> Hardware:
    """Return the machine before it is known what a call takes in a real program."""
    runs = tuple(Run(run["ranks"], tuple(map(_table, run["tables"]))) for run in found["runs"])
    on_cpu = device == "cpu"
    preset = CPU_GLOO if on_cpu else GENERIC
    memory = _memory_bytes() // ranks if on_cpu else torch.cuda.get_device_properties(0).total_memory
    links = found["links"]
    tp_link = _link(links["tp"], preset.tp_link) if links else preset.tp_link
    pp_link = _link(links["pp"], preset.pp_link) if links else preset.pp_link
    machine = Hardware(
        name=f"measured-{machine_name(device)}",
        flops=tuple((t.dtype, _rate(t, on_cpu)) for t in runs[0].tables if t.kind == PRODUCT),
        memory_bandwidth=max(
            at[0] / _work(t, s, on_cpu) for t in runs[0].tables if t.kind == STREAM for at, s in t.points()
        ),
        memory_bytes=memory,
        op_seconds=0.0,
        view_seconds=0.0,
        tp_link=tp_link,
        pp_link=pp_link,
        ranks_per_node=preset.ranks_per_node if on_cpu else ranks,
        inter_node=preset.inter_node,
        dispatches_ahead=not on_cpu,
        fuses_norms=not on_cpu,
        ranks_share_device=on_cpu,
        measured=Measured(ranks if on_cpu else 0, runs),
    )
    return machine.computing(1)


def _table(found: dict[str, Any]) -> Table:
    return Table(
        found["kind"],
        found["dtype"],
        tuple(map(tuple, found["axes"])),
        tuple(float(f"{seconds:.4g}") for seconds in found["seconds"]),
        float(f"{found['fixed_seconds']:.4g}"),
    )


def _rate(products: Table, on_cpu: bool) -> float:
    """Return the most FLOP/s that any product reached."""
    return max(2 * m * k * n / _work(products, seconds, on_cpu) for (m, k, n), seconds in products.points())


def _work(table: Table, seconds: float, on_cpu: bool) -> float:
    """Return the seconds of an op without its call, where the two were measured apart (measure/rank.py)."""
    return seconds if on_cpu else max(seconds - table.fixed_seconds, _LEAST_SECONDS)


def _link(tables: list[dict[str, Any]], preset: Link) -> Link:
    """Return a link whose formula comes near what was measured of its first kind of message, from the smallest and the
    largest; the tables have the rest."""
    found = tuple(map(_table, tables))
    points = list(found[0].points())
    (_, small), ((_, nbytes), large) = points[0], points[-1]
    return replace(
        preset,
        launch_seconds=small / 2,
        latency_seconds=small / 2,
        bandwidth=nbytes / max(large - small, small),
        tables=found,
    )


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
