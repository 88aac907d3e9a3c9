"""Measures the constants of the "cpu-gloo" preset in cost_model/costs/hardware.py on this machine.

    python benchmarks/measure_hardware.py [--ranks 2] [--repeats 60]

Prints matmul FLOP/s per dtype, streaming bandwidth and fixed cost per op of one thread; seconds of our communicator's
all_reduce and all_gather (shared memory on one machine), of Gloo's own on loopback, and of a send. One thread a rank,
every rank computing at once, since that is how ranks share a CPU.
"""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections.abc import Callable
from multiprocessing.queues import Queue

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from autodist_fx.runtime.comm.dist_communicator import DistCommunicator
from cost_model.mesh import Mesh

Report = list[tuple[str, str]]
MESSAGE_BYTES = (3 * 1024, 64 * 1024, 1024**2, 16 * 1024**2)


def best_seconds(call: Callable[[], object], repeats: int, window: float = 0.01) -> float:
    """The least, over `repeats`, of the mean seconds a call: other work on the machine only ever makes it slower.

    The number of calls is settled by rank 0's clock where ranks talk, so that all ranks make the same calls.
    """
    call()
    start = time.perf_counter()
    call()
    once = max(time.perf_counter() - start, 1e-7)
    calls = torch.tensor(max(1, int(window / once)))
    dist.broadcast(calls, 0)
    means = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        for _ in range(int(calls)):
            call()
        means.append((time.perf_counter() - start) / int(calls))
    return min(means)


def measure_compute(repeats: int) -> Report:
    report: Report = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for m, k, n in ((512, 768, 2048), (1, 768, 2048)):
            x, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
            seconds = best_seconds(lambda x=x, w=w: torch.nn.functional.linear(x, w), repeats)  # type: ignore[misc]
            rate = 2 * m * k * n / seconds
            weight_rate = w.numel() * w.element_size() / seconds
            report.append((f"linear {m}x{k}x{n} {dtype}", f"{rate / 1e9:8.2f} GFLOP/s  {weight_rate / 1e9:6.2f} GB/s"))
    # 64 MiB in and out: larger than the last-level cache's share of a rank, so this is memory, not cache.
    a, out = torch.randn(16 * 1024**2), torch.empty(16 * 1024**2)
    seconds = best_seconds(lambda: torch.add(a, 1.0, out=out), repeats)
    report.append(("streaming add, bytes read + written", f"{2 * a.nbytes / seconds / 1e9:8.2f} GB/s"))
    # A weight too large for the cache, one row of input: what decoding does.
    x, w = torch.randn(1, 4096), torch.randn(16384, 4096)
    seconds = best_seconds(lambda: torch.nn.functional.linear(x, w), repeats)
    report.append(("reading a 256 MiB weight, one token", f"{w.nbytes / seconds / 1e9:8.2f} GB/s"))
    small, square = torch.randn(1, 1, 64), torch.randn(64, 64)
    for name, call in (
        ("add of 64 elements", lambda: small + small),
        ("silu of 64 elements", lambda: torch.nn.functional.silu(small)),
        ("view", lambda: small.view(64)),
        ("transpose", lambda: small.transpose(1, 2)),
        ("linear 64 -> 64", lambda: torch.nn.functional.linear(small, square)),
    ):
        report.append((f"fixed cost: {name}", f"{best_seconds(call, repeats) * 1e6:8.2f} us"))
    return report


def measure_links(rank: int, ranks: int, repeats: int) -> Report:
    report: Report = []
    ours = DistCommunicator(Mesh(tp=ranks), torch.device("cpu"))
    for nbytes in MESSAGE_BYTES:
        x = torch.randn(nbytes // 4)
        parts = [torch.empty(nbytes // 4 // ranks) for _ in range(ranks)]
        piece = x[: nbytes // 4 // ranks].clone()
        split = tuple(((r * len(piece), (r + 1) * len(piece)),) for r in range(ranks))

        def exchange(x: torch.Tensor = x) -> None:  # there and back: half of it is one send
            if rank == 0:
                dist.send(x, 1)
                dist.recv(x, 1)
            elif rank == 1:
                dist.recv(x, 0)
                dist.send(x, 0)

        calls: list[tuple[str, Callable[[], object], float]] = [
            ("all_reduce", lambda x=x: ours.all_reduce(x, "tp"), 1.0),  # type: ignore[misc]
            ("all_gather", lambda y=piece, s=split: ours.all_gather(y, "tp", 0, s), 1.0),  # type: ignore[misc]
            ("all_reduce of Gloo", lambda x=x: dist.all_reduce(x), 1.0),  # type: ignore[misc]
            ("all_gather of Gloo", lambda p=parts, y=piece: dist.all_gather(p, y), 1.0),  # type: ignore[misc]
            ("send", exchange, 0.5),
        ]
        for name, call, share in calls:
            seconds = best_seconds(call, repeats) * share
            rate = nbytes / seconds
            report.append((f"{name:<18} {nbytes:>9} B whole", f"{seconds * 1e6:9.1f} us  {rate / 1e9:6.3f} GB/s"))
    return report


def rank_main(rank: int, ranks: int, port: int, repeats: int, results: Queue[Report]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    with torch.inference_mode():
        report = measure_compute(repeats) + measure_links(rank, ranks, repeats)
    if rank == 0:
        results.put(report)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=60)
    args = parser.parse_args()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    results: Queue[Report] = context.Queue()
    workers = [
        context.Process(target=rank_main, args=(r, args.ranks, port, args.repeats, results)) for r in range(args.ranks)
    ]
    for worker in workers:
        worker.start()
    for name, value in results.get(timeout=300):
        print(f"{name:<44} {value}")
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main()
