"""Measure this machine, so that plans are predicted for what it is: ops, messages and calls, alone and all ranks at
once.

Takes about two minutes, in which nothing else should run. Plans are predicted for what was measured from then on,
unless --hardware names something else.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

from autodist_fx.cli.arguments import at_least, be_quiet
from autodist_fx.errors import AutodistError
from autodist_fx.measure.machine import default_ranks, measure_machine
from autodist_fx.runtime.comm.process_group import started_by_torchrun
from autodist_fx.runtime.default_hardware import measured_file
from cost_model.costs.communication import all_reduce_seconds, send_seconds
from cost_model.costs.compute import op_seconds
from cost_model.costs.hardware import Hardware
from cost_model.costs.leave_one_out import left_out_errors
from cost_model.format import bytes_text, count_text, seconds_text
from cost_model.graph.op_graph import Op, TensorSpec
from cost_model.request.hardware_file import save_hardware
from cost_model.text_tables import table

EXAMPLES = (
    ("autodist-fx measure", "this machine, with a rank for each core or GPU"),
    ("autodist-fx measure --ranks 4 --save four.json", "kept apart"),
    ("autodist-fx plan --model DIR --tp 4 --hardware four.json", "a plan for it"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `autodist-fx measure`."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="what ranks run on (cuda where it is)")
    parser.add_argument("--ranks", type=at_least(1), metavar="N", help="ranks at once (one a core or GPU, 8 at most)")
    parser.add_argument("--quick", action="store_true", help="at few sizes, in some 30 s: for a try")
    parser.add_argument("--save", metavar="FILE", help="for --hardware FILE; else kept as this machine's")


def run(args: argparse.Namespace) -> int:
    """Measure, print a summary, and keep the figures; return the exit code."""
    be_quiet()
    if started_by_torchrun():
        raise AutodistError("measure starts its ranks itself: run it without torchrun")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise AutodistError("--device cuda: torch sees no GPU here")
    ranks = args.ranks or default_ranks(device)
    if device == "cuda" and ranks > torch.cuda.device_count():
        raise AutodistError(f"--ranks {ranks}: each has a GPU of its own, and there are {torch.cuda.device_count()}")
    if args.save and not args.save.endswith(".json"):
        raise AutodistError(f"--save {args.save}: give a name that ends in .json, as --hardware takes it")
    path = Path(args.save) if args.save else measured_file(device)
    machine, about = measure_machine(device, ranks, quick=args.quick)
    save_hardware(machine, about, path)
    print("\n".join([f"{machine.name} ({about.processor}, torch {about.torch})", "", *_summary(machine)]))
    print(f"\nkept as {path}" + ("" if args.save else ": what plans are predicted for from now on"))
    return 0


def _summary(machine: Hardware) -> list[str]:
    """Format what was measured, in a dozen figures."""
    assert machine.measured is not None
    runs = machine.measured.runs
    rows = [["", *(f"{run.ranks} rank{'s at once' if run.ranks > 1 else ''}" for run in runs)]]
    at = [machine.computing(run.ranks) for run in runs]
    for dtype, _ in machine.flops:
        rates = [2 * 512 * 2048 * 2048 / _product_seconds(hw, dtype, 512, 2048, 2048) for hw in at]
        rows.append([f"product 512 x 2048 x 2048, {dtype}", *(f"{count_text(rate)}FLOP/s" for rate in rates)])
    rates = [4 * 2048 * 2048 / _product_seconds(hw, "float32", 1, 2048, 2048) for hw in at]
    rows.append(["weights read by a product of one row, float32", *(f"{count_text(rate)}B/s" for rate in rates)])
    rows.append(["an op's call in a program", *(seconds_text(hw.op_seconds) for hw in at)])
    rows.append(["a view's", *(seconds_text(hw.view_seconds) for hw in at)])
    lines = table(rows, left=(0,))
    lines += ["", f"a step of generating, beside its program: {seconds_text(machine.measured.step_seconds)}"]
    if machine.tp_link.tables:
        ranks = runs[-1].ranks
        for nbytes in (2**12, 2**21):
            reduced = seconds_text(all_reduce_seconds(nbytes, ranks, machine.tp_link))
            sent = seconds_text(send_seconds(nbytes, machine.pp_link))
            lines.append(f"{bytes_text(nbytes)}: all_reduce of {ranks} ranks {reduced}, send {sent}")
    errors = [error for _, _, error in left_out_errors(machine)]
    lines.append(
        f"{len(errors)} points, each predicted from its neighbours: median error {statistics.median(errors):.1%}, "
        f"ninth decile {statistics.quantiles(errors, n=10)[-1]:.1%}"
    )
    return lines


def _product_seconds(machine: Hardware, dtype: str, rows: int, inner: int, columns: int) -> float:
    x, weight, y = ((rows, inner), (columns, inner), (rows, columns))
    specs = [TensorSpec(shape, dtype) for shape in (x, weight, y)]
    return op_seconds(Op("product", "linear"), specs[:2], specs[2:], machine)
