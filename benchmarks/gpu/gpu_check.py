"""Checks a machine with one GPU, in under eight minutes, and prints a table (docs/gpu.md). `make gpu-check`

Where there is no GPU it says so, and ends with 0. Else it ends with 0 if all is right, with 1 if a check failed.

    one rank, and several that share the GPU (over Gloo): the same tokens as transformers' generate on this GPU
    CUDA graphs off and on: tokens per second, and the same tokens
    bfloat16: each step's logits no further from float32's than transformers' own, and tokens per second
    three steps of training over two ranks: the losses of one process on this GPU
    predictions: the plan's seconds of a step of decoding against the measured ones
    autodist-fx measure --device cuda, where the command is there: what predictions are then made with
    NCCL: a group of one rank, its collectives, also within a captured graph
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
WORKER = str(HERE.with_name("gpu_worker.py"))
SECONDS = 470.0  # for all of it
STEP_SECONDS = 120.0  # for one check
MOST_LOSS_DIFFERENCE = 1e-4  # relative: float32, added up in another order, after a step or two
MOST_BF16_ERROR = 1.5  # times transformers' own
MEASURE_SECONDS = 170.0


def gpus() -> int:
    """Return the number of GPUs, asked of the driver itself: importing torch takes seconds."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


@dataclass
class Row:
    """A line of the table."""

    check: str
    verdict: str = ""
    measured: str = ""
    predicted: str = ""
    note: str = ""


@dataclass
class Check:
    """The checks: what was found so far, and until when there is time."""

    until: float
    directory: Path
    logs: Path | None = None
    rows: list[Row] = field(default_factory=list)
    wanted: dict[str, Any] = field(default_factory=dict)  # what transformers does

    def run(self, name: str, command: list[str], seconds: float = STEP_SECONDS, **env: str) -> tuple[int, str, str]:
        """Return (exit code, the last line of stdout, stderr's that says what went wrong) of a command; 124 when it
        took too long."""
        left = min(seconds, self.until - time.monotonic())
        if left <= 0:
            return 124, "", "no time was left"
        print(f"gpu-check: {name} ...", file=sys.stderr, flush=True)
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", **env}
        began = time.monotonic()
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=left, check=False)
        except subprocess.TimeoutExpired as late:
            self._log(name, f"longer than {left:.0f} s", late.stdout, late.stderr)
            return 124, "", f"longer than {left:.0f} s"
        how = f"ended with {done.returncode} after {time.monotonic() - began:.1f} s"
        self._log(name, how, done.stdout, done.stderr)
        return done.returncode, _last(done.stdout), _error(done.stderr)

    def _log(self, name: str, how: str, *outputs: str | bytes | None) -> None:
        if self.logs is not None:
            texts = [x.decode(errors="replace") if isinstance(x, bytes) else x or "" for x in outputs]
            with (self.logs / "gpu_check.log").open("a") as log:
                log.write("\n".join([f"==== {name}: {how}", *texts, ""]))

    def generate(self, name: str, *, tp: int = 1, pp: int = 1, graphs: bool = False, dtype: str = "float32") -> None:
        """Generate on `tp * pp` ranks, and add a row."""
        found = self._on_ranks(name, "--rank", tp * pp, tp=tp, pp=pp, graphs=graphs, dtype=dtype)
        if found is None:
            return
        each, predicted = found["seconds_per_token"], found["predicted_seconds"]
        right, note = (self._same_tokens if dtype == "float32" else self._as_near)(found)
        self.rows.append(
            Row(
                name, "ok" if right else "WRONG", f"{each * 1e3:.2f} ms a token ({1 / each:.0f} tokens/s)",
                f"{predicted * 1e3:.2f} ms (x{predicted / each:.2f}), with {found['hardware']}", note,
            )
        )  # fmt: skip

    def _same_tokens(self, found: dict[str, Any]) -> tuple[bool, str]:
        right = found["tokens"] == self.wanted["tokens"]
        return right, f"{'the' if right else 'other'} tokens {'of' if right else 'than'} transformers' generate"

    def _as_near(self, found: dict[str, Any]) -> tuple[bool, str]:
        """Compare errors of bfloat16 steps, whose roundings may make another token the largest: of all steps' logits,
        each of which goes on with float32's token."""
        ours, theirs = found["bf16_error"], self.wanted["bf16_error"]
        return ours <= MOST_BF16_ERROR * theirs, f"logits {ours:.1e} from float32's, transformers' {theirs:.1e}"

    def train(self, name: str, *, tp: int = 1, pp: int = 1) -> None:
        """Train on `tp * pp` ranks, and add a row."""
        found = self._on_ranks(name, "--train", tp * pp, tp=tp, pp=pp)
        if found is None:
            return
        wanted = self.wanted["losses"]
        worst = max(abs(a - b) / abs(b) for a, b in zip(found["losses"], wanted, strict=True))
        right = worst <= MOST_LOSS_DIFFERENCE
        losses = " ".join(f"{loss:.4f}" for loss in found["losses"])
        note = f"losses {losses}; {worst:.0e} from one process's"
        self.rows.append(Row(name, "ok" if right else "WRONG", f"{found['seconds'] * 1e3:.0f} ms a step", note=note))

    def _on_ranks(self, name: str, what: str, ranks: int, **asked: Any) -> dict[str, Any] | None:
        """Return what rank 0 printed; None, and a row, where a rank failed."""
        command = [WORKER, what, json.dumps({"model": str(self.directory), **asked})]
        run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        code, line, error = self.run(name, [sys.executable, *run, *command])
        if code:
            self.rows.append(Row(name, "FAILED", note=error or f"exit code {code}"))
            return None
        found: dict[str, Any] = json.loads(line)
        return found


def main() -> int:
    """Run all checks, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", metavar="DIR", help="an existing directory: all that the checks print is kept there")
    parser.add_argument("--is-there", action="store_true", help="only say, by the exit code, whether there is a GPU")
    arguments = parser.parse_args()
    if not gpus():
        print("no GPU: nothing was checked (the driver's libcuda.so.1 shows none)")
        return int(arguments.is_there)
    if arguments.is_there:
        return 0
    with tempfile.TemporaryDirectory() as directory:
        check = Check(time.monotonic() + SECONDS, Path(directory), Path(arguments.logs) if arguments.logs else None)
        _all(check)
    _print(check.rows)
    return int(any(row.verdict in ("FAILED", "WRONG") for row in check.rows))


def _all(check: Check) -> None:
    code, line, error = check.run("transformers", [sys.executable, WORKER, "--reference", str(check.directory)])
    if code:
        check.rows.append(Row("transformers' own generate", "FAILED", note=error))
        return
    check.wanted = found = json.loads(line)
    each = f"{found['seconds_per_token'] * 1e3:.2f} ms a token"
    bf16 = f"in bfloat16 {found['bf16_seconds_per_token'] * 1e3:.2f}"
    check.rows.append(Row("transformers' own generate", "ok", f"{each}; {bf16}", note=found["gpu"]))
    code, line, error = check.run("NCCL", [sys.executable, WORKER, "--nccl"])
    check.rows.append(Row("NCCL, a group of one", "FAILED" if code else "ok", note=error if code else line))
    _measure(check)
    check.generate("one rank")
    check.generate("one rank, CUDA graphs", graphs=True)
    check.generate("one rank, bfloat16", dtype="bfloat16")
    check.generate("one rank, bfloat16, CUDA graphs", dtype="bfloat16", graphs=True)
    check.generate("tp=2 on one GPU, Gloo", tp=2)
    check.generate("tp=2 on one GPU, Gloo, CUDA graphs", tp=2, graphs=True)
    check.generate("pp=2 on one GPU, Gloo", pp=2)
    check.train("training, tp=2 on one GPU", tp=2)
    check.train("training, pp=2 on one GPU", pp=2)


def _measure(check: Check) -> None:
    """Run `autodist-fx measure`, whose result plans are made with from then on."""
    name, command = "autodist-fx measure --device cuda", [sys.executable, "-m", "autodist_fx.cli.main", "measure"]
    if check.run(name, [*command, "--help"])[0]:
        check.rows.append(Row(name, "absent", note="this version has no such command: predictions are by the preset"))
        return
    began = time.monotonic()
    code, line, error = check.run(name, [*command, "--device", "cuda", "--ranks", "1"], MEASURE_SECONDS)
    seconds = f"{time.monotonic() - began:.0f} s"
    check.rows.append(Row(name, "FAILED" if code else "ok", seconds, note=error if code else line))


def _print(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="gpu-check", title_justify="left")
    for column in ("check", "verdict", "measured", "predicted (by how much of it)", "note"):
        table.add_column(column, overflow="fold")
    for row in rows:
        style = {"ok": "green", "absent": "yellow"}.get(row.verdict, "bold red")
        table.add_row(row.check, f"[{style}]{row.verdict}[/]", row.measured, row.predicted, row.note)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _error(text: str) -> str:
    """Return the last line that names an error; else the last. A launcher says more after it."""
    named = [line.strip() for line in text.splitlines() if re.match(r"(\[rank\d+\]: )?[\w.]+(Error|Exception): ", line)]
    return named[-1] if named else _last(text)


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


if __name__ == "__main__":
    sys.exit(main())
