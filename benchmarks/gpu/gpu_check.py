"""Checks a machine with one GPU, in under eight minutes, and prints a table (docs/gpu.md). `make gpu-check`

Where there is no GPU it says so, and ends with 0. Else it ends with 0 if all is right, with 1 if a check failed.

    one rank, and several that share the GPU (over Gloo): the same tokens as transformers' generate on this GPU
    CUDA graphs off and on: tokens per second, and the same tokens
    predictions: the plan's seconds of a step of decoding against the measured ones
    autodist-fx measure --device cuda, where the command is there: what predictions are then made with
    NCCL: a group of one rank, its collectives, also within a captured graph
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
PROMPT, NEW_TOKENS = 448, 128  # the middle of which has 512 tokens in its cache, which plans are made for
SECONDS = 470.0  # for all of it
STEP_SECONDS = 120.0  # for one check
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
    rows: list[Row] = field(default_factory=list)
    tokens: list[int] | None = None  # of transformers' generate

    def run(self, name: str, command: list[str], seconds: float = STEP_SECONDS, **env: str) -> tuple[int, str, str]:
        """Return (exit code, the last line of stdout, the last of stderr) of a command; 124 when it took too long."""
        left = min(seconds, self.until - time.monotonic())
        if left <= 0:
            return 124, "", "no time was left"
        print(f"gpu-check: {name} ...", file=sys.stderr, flush=True)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **env}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=left, check=False)
        except subprocess.TimeoutExpired:
            return 124, "", f"longer than {left:.0f} s"
        return done.returncode, _last(done.stdout), _last(done.stderr)

    def ranks(self, name: str, *, tp: int = 1, pp: int = 1, graphs: bool = False) -> dict[str, Any] | None:
        """Generate on `tp * pp` ranks, add a row, and return what was measured; None where it failed."""
        asked = {"model": str(self.directory), "tp": tp, "pp": pp, "graphs": graphs}
        command = [sys.executable, str(HERE), "--rank", json.dumps(asked)]
        if tp * pp > 1:
            run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(tp * pp)]
            command = [sys.executable, *run, *command[1:]]
        code, line, error = self.run(name, command)
        if code:
            self.rows.append(Row(name, "FAILED", note=error or f"exit code {code}"))
            return None
        found: dict[str, Any] = json.loads(line)
        right = found["tokens"] == self.tokens
        each, predicted = found["seconds_per_token"], found["predicted_seconds"]
        self.rows.append(
            Row(
                name, "ok" if right else "WRONG", f"{each * 1e3:.2f} ms a token ({1 / each:.0f} tokens/s)",
                f"{predicted * 1e3:.2f} ms (x{predicted / each:.2f}), with {found['hardware']}",
                "the tokens of transformers' generate" if right else "other tokens than transformers' generate",
            )
        )  # fmt: skip
        return found


def main() -> int:
    """Run all checks, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", help=argparse.SUPPRESS)  # one rank's part, as JSON
    parser.add_argument("--is-there", action="store_true", help="only say, by the exit code, whether there is a GPU")
    parser.add_argument("--nccl", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--reference", metavar="DIR", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not gpus():
        print("no GPU: nothing was checked (the driver's libcuda.so.1 shows none)")
        return int(arguments.is_there)
    if arguments.is_there:
        return 0
    if arguments.rank:
        return _rank(json.loads(arguments.rank))
    if arguments.nccl:
        return _nccl()
    if arguments.reference:
        return _reference(arguments.reference)
    with tempfile.TemporaryDirectory() as directory:
        check = Check(time.monotonic() + SECONDS, Path(directory))
        _all(check)
    _print(check.rows)
    return int(any(row.verdict in ("FAILED", "WRONG") for row in check.rows))


def _all(check: Check) -> None:
    code, line, error = check.run("transformers", [sys.executable, str(HERE), "--reference", str(check.directory)])
    if code:
        check.rows.append(Row("transformers' own generate", "FAILED", note=error))
        return
    found = json.loads(line)
    check.tokens = found["tokens"]
    check.rows.append(
        Row("transformers' own generate", "ok", f"{found['seconds_per_token'] * 1e3:.2f} ms a token", note=found["gpu"])
    )
    code, line, error = check.run("NCCL", [sys.executable, str(HERE), "--nccl"])
    check.rows.append(Row("NCCL, a group of one", "FAILED" if code else "ok", note=error if code else line))
    _measure(check)
    check.ranks("one rank")
    check.ranks("one rank, CUDA graphs", graphs=True)
    check.ranks("tp=2 on one GPU, Gloo", tp=2)
    check.ranks("tp=2 on one GPU, Gloo, CUDA graphs", tp=2, graphs=True)
    check.ranks("pp=2 on one GPU, Gloo", pp=2)


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


def _prompt() -> Any:
    import torch

    return torch.randint(3, 32000, (1, PROMPT), generator=torch.Generator().manual_seed(1))


def _timed(generate: Any) -> tuple[list[int], float]:
    """Return (new tokens, seconds a token of decoding): of a second call, without the prompt's own time."""
    import torch

    def seconds(tokens: int) -> tuple[float, Any]:
        torch.cuda.synchronize()
        began = time.perf_counter()
        found = generate(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        torch.cuda.synchronize()
        return time.perf_counter() - began, found

    seconds(NEW_TOKENS)  # kernels are chosen, graphs captured
    (one, _), (all_of_them, found) = seconds(1), seconds(NEW_TOKENS)
    return found[0, PROMPT:].tolist(), (all_of_them - one) / (NEW_TOKENS - 1)


def _reference(directory: str) -> int:
    """Write a checkpoint of the 125M shape with random weights, and generate with transformers, on the GPU."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=12, max_position_embeddings=2048, initializer_range=0.05, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(directory)
    model = model.to("cuda")
    with torch.no_grad():
        ids = _prompt().to("cuda")
        tokens, each = _timed(lambda **options: model.generate(ids, attention_mask=torch.ones_like(ids), **options))
    properties = torch.cuda.get_device_properties(0)
    memory = f"{properties.total_memory / 2**30:.0f} GiB"
    gpu = f"{properties.name}, {memory}, CUDA {torch.version.cuda}, torch {torch.__version__}"
    print(json.dumps({"tokens": tokens, "seconds_per_token": each, "gpu": gpu}))
    return 0


def _rank(asked: dict[str, Any]) -> int:
    """Generate as one rank; rank 0 prints what it measured."""
    import torch

    import autodist_fx as adx

    model = adx.from_pretrained(
        asked["model"], tp=asked["tp"], pp=asked["pp"], device="cuda", cuda_graphs=asked["graphs"]
    )
    ids = _prompt().to(model.device)
    tokens, each = _timed(lambda **options: model.generate(ids, attention_mask=torch.ones_like(ids), **options))
    if model.rank == 0:
        plan = model.plan
        print(
            json.dumps(
                {
                    "tokens": tokens, "seconds_per_token": each, "predicted_seconds": plan.predicted_seconds,
                    "hardware": getattr(plan.hardware, "name", str(plan.hardware)),
                }
            )
        )  # fmt: skip
    return 0


def _nccl() -> int:
    """Sum over a group of one rank, then within a captured graph."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from autodist_fx.runtime.device import cuda

    device = torch.device("cuda", 0)
    cuda.claim(device)
    group = cuda.nccl_group(dist.HashStore(), 0, 1, timedelta(seconds=60), device)
    x = torch.arange(4.0, device=device)

    def doubled() -> torch.Tensor:
        y = x * 2
        group.allreduce([y]).wait()
        return y

    replay, y = cuda.Pool(device).capture(doubled)
    x.fill_(3.0)
    replay()
    assert doubled().tolist() == y.tolist() == [6.0] * 4
    version = ".".join(map(str, torch.cuda.nccl.version()))
    print(f"NCCL {version}: all_reduce, and all_reduce within a captured graph; {cuda.identity(device)}")
    return 0


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


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


if __name__ == "__main__":
    sys.exit(main())
