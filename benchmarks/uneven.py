"""Train over two ranks of which one has a part of a core: the cut by cost against the even one, predicted and measured.

python benchmarks/uneven.py [--hardware FILE] [--busy 1]

Rank 0 has a core of its own; a loop that never waits runs beside rank 1, on the same core. How much of it that leaves
is measured by a product that both ranks make, and said to the planner as a device_map; both predictions are made before
any step is timed. About a minute on two cores. Ends with 1 where the cut by cost is less than 1.25 times as fast, or a
prediction is off by more than 15 %.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import shapes
import torch
from markdown_table import table
from processes import Ranks, answer, serve
from transformers import LlamaConfig

LAYERS, BATCH, TOKENS, MICROBATCHES, STEPS = 12, 16, 64, 8, 3
LEAST_GAIN, MOST_ERROR = 1.25, 0.15


def config() -> LlamaConfig:
    """Layers count here, and not what is before and behind them."""
    return LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=1024, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip


# -- in a rank's process -----------------------------------------------------------------------------------------------


def speed() -> dict[str, Any]:
    """Products a second, over two seconds: long enough for the system to share a core out fairly."""
    x, weight = torch.randn(128, 512), torch.randn(1408, 512)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < 2.0:
        torch.nn.functional.linear(x, weight)
        count += 1
    return {"speed": count / (time.perf_counter() - began)}


def train(path: str, hardware: str, shares: list[float], cuts: list[int] | None) -> dict[str, Any]:
    """Seconds of a step, predicted and then measured, and the layers of each stage."""
    import torch.distributed as dist

    import autodist_fx as adx
    from cost_model.request.hardware_file import load_hardware

    machine = load_hardware(hardware)[0]
    devices = [machine.at_share(share) for share in shares]
    engine = adx.train(path, pp=2, microbatches=MICROBATCHES, device_map=devices, cuts=cuts)
    ids = torch.randint(0, 1024, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    engine.step(batch)
    predicted = engine.estimate(batch).seconds
    seconds = []
    for _ in range(STEPS):
        dist.barrier()
        began = time.perf_counter()
        engine.step(batch)
        seconds.append(time.perf_counter() - began)
    layers = [sum(".layers." in name for name in stage.layers) for stage in engine.plan.stages]
    return {"predicted": predicted, "measured": statistics.median(seconds), "layers": layers}


# -- the command -------------------------------------------------------------------------------------------------------


def main() -> int:
    if sys.argv[1:] == ["--rank"]:
        answer(dict)
        serve({"speed": speed, "train": train})
        return 0
    from autodist_fx.runtime.default_hardware import measured_file

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hardware", type=Path, help="a file of `autodist-fx measure` (this machine's)")
    parser.add_argument("--busy", type=int, default=1, help="loops beside rank 1 (1: half of a core)")
    args = parser.parse_args()
    file = args.hardware or measured_file("cpu")
    if not file.is_file():
        print(f"{file} is not there: run `autodist-fx measure` first", file=sys.stderr)
        return 2
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        print("this needs two cores", file=sys.stderr)
        return 2
    loops: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="adx-bench-") as directory:
        shapes.write_checkpoint(config(), Path(directory) / "model")
        ranks = Ranks("uneven.py", ["--rank"], 2, threads=1, log=Path(directory) / "log")
        try:
            for core, process in zip(cores, ranks.processes, strict=False):  # before they start threads
                os.sched_setaffinity(process.pid, {core})
            ranks.read()
            before = [found["speed"] for found in ranks.ask("speed")]
            for _ in range(args.busy):
                loops.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
                os.sched_setaffinity(loops[-1].pid, {cores[1]})
            after = [found["speed"] for found in ranks.ask("speed")]
            shares = [1.0, min(1.0, after[1] / before[1])]
            asked = {"path": str(Path(directory) / "model"), "hardware": str(file), "shares": shares}
            even = _slowest(ranks.ask("train", cuts=[LAYERS // 2], **asked))
            by_cost = _slowest(ranks.ask("train", cuts=None, **asked))
        finally:
            for loop in loops:
                loop.kill()
                loop.wait()
            ranks.close()
    return _report(shares[1], even, by_cost)


def _slowest(answers: list[dict[str, Any]]) -> dict[str, Any]:
    return max(answers, key=lambda found: found["measured"])


def _report(share: float, even: dict[str, Any], by_cost: dict[str, Any]) -> int:
    rows = []
    for name, found in (("even cut", even), ("cut by cost", by_cost)):
        error = found["predicted"] / found["measured"] - 1
        layers = " + ".join(map(str, found["layers"]))
        rows.append([name, layers, f"{found['predicted']:.3f}", f"{found['measured']:.3f}", f"{error:+.1%}"])
    gain = {key: even[key] / by_cost[key] for key in ("predicted", "measured")}
    error = gain["predicted"] / gain["measured"] - 1
    rows.append(["gain", "", f"{gain['predicted']:.2f}x", f"{gain['measured']:.2f}x", f"{error:+.1%}"])
    print(f"pp=2, {LAYERS} layers, {MICROBATCHES} microbatches; rank 1 has {share:.2f} of its core\n")
    print(table(["", "layers", "predicted s", "measured s", "error"], rows))
    right = gain["measured"] >= LEAST_GAIN and abs(error) <= MOST_ERROR
    print(f"\nmeasured gain {'reaches' if gain['measured'] >= LEAST_GAIN else 'misses'} {LEAST_GAIN}x")
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
