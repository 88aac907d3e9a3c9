"""One rank of `autodist-fx measure`: ops alone, on rank 0, then on all ranks at once, then messages between them.

    python -m autodist_fx.measure.rank --device cpu --results FILE

Rank 0 shows the progress on stderr, and writes what was found as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from autodist_fx.measure.chain import Clock, Effort, MakeCall, device_seconds, effort_for, node_seconds
from autodist_fx.measure.messages import Messages, message_tables
from autodist_fx.measure.pool import Pool
from autodist_fx.measure.subjects import Subject, subjects
from autodist_fx.runtime.comm.join_options import JoinOptions
from autodist_fx.runtime.comm.process_group import JoinedRank, join
from cost_model.mesh import Mesh

MAIN = {"cpu": torch.float32, "cuda": torch.bfloat16}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Efforts = dict[tuple[str, ...], Effort]
Seconds = Callable[[MakeCall, Clock, Effort], float]
Advance = Callable[[str], None]


def main() -> None:
    """Measure as the rank that the environment says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    ranks = int(os.environ["WORLD_SIZE"])
    joined = join(Mesh(tp=ranks), JoinOptions(device=args.device))
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn(),
        console=Console(stderr=True), disable=joined.rank > 0,
    )  # fmt: skip
    with progress, torch.no_grad():
        task = progress.add_task("imports", total=_points(args.device, args.quick) * (2 if ranks > 1 else 1))

        def advance(what: str) -> None:
            progress.update(task, advance=1, description=f"{what:<44}")

        found = _Rank(joined, advance, args.quick).measure()
    if joined.rank == 0:
        args.results.write_text(json.dumps(found))


def _points(device: str, quick: bool) -> int:
    return sum(1 + len(list(product(*subject.axes))) for _, subject in _subjects(device, quick))


def _subjects(device: str, quick: bool) -> Iterator[tuple[torch.dtype, Subject]]:
    for dtype in DTYPES:
        for subject in subjects(dtype, MAIN[device]):
            yield dtype, replace(subject, axes=tuple(map(_thinned, subject.axes))) if quick else subject


def _thinned(axis: tuple[float, ...]) -> tuple[float, ...]:
    """Return the ends of an axis, without the largest, which take longest, and the middle."""
    return axis if len(axis) < 4 else (axis[0], axis[len(axis) // 2 - 1], axis[-2])


class _Rank:
    """The measurements of one rank, in the order that all of them keep."""

    def __init__(self, joined: JoinedRank, advance: Advance, quick: bool) -> None:
        self.joined, self.advance, self.quick = joined, advance, quick
        self.device, self.ranks = joined.device, joined.mesh.size

    def measure(self) -> dict[str, Any]:
        """Return all tables; what each rank found apart is rank 0's to put together."""
        efforts: Efforts = {}
        runs = []
        if self.joined.rank == 0:
            alone = Clock(self.device, lambda: None)
            runs.append({"ranks": 1, "tables": self._tables(alone, efforts, "one rank")})
        if self.ranks == 1:
            return {"runs": runs, "links": {}}
        # The others wait here, asleep, until rank 0 has measured alone; then all know how often each op is to run.
        said = self.joined.everyone(json.dumps([[*key, e.nodes, e.repeats] for key, e in efforts.items()]))
        efforts = {tuple(key): Effort(nodes, repeats) for *key, nodes, repeats in json.loads(said[0])}
        together = Clock(self.device, self._meet)
        mine = self._tables(together, efforts, f"{self.ranks} ranks at once")
        tables = [json.loads(text) for text in self.joined.everyone(json.dumps(mine))]
        for table, *others in zip(*tables, strict=True):  # the slowest rank is what the others wait for
            table["seconds"] = [max(s) for s in zip(*(t["seconds"] for t in (table, *others)), strict=True)]
            table["fixed_seconds"] = max(t["fixed_seconds"] for t in (table, *others))
        runs.append({"ranks": self.ranks, "tables": tables[0]})
        return {"runs": runs, "links": self._links(together)}

    def _meet(self) -> None:
        self.joined.communicator.all_reduce(torch.zeros(1, device=self.device), "tp")

    def _tables(self, clock: Clock, efforts: Efforts, what: str) -> list[dict[str, Any]]:
        found, pool = [], None
        for dtype, subject in _subjects(self.device.type, self.quick):
            if pool is None or pool.dtype != dtype:
                pool = None  # before the next is made
                pool = Pool(dtype, self.device)
            name = str(dtype).removeprefix("torch.")
            self.advance(f"{what}: {subject.kind} {name}")

            def seconds(
                sizes: tuple[float, ...], how: Seconds, subject: Subject = subject, pool: Pool = pool
            ) -> float:
                def make() -> Any:
                    return subject.make(pool, sizes)

                key = (subject.kind, str(pool.dtype), str(sizes))
                if key not in efforts:  # rank 0, alone: the others take what it found right
                    efforts[key] = effort_for(make, clock)
                return how(make, clock, efforts[key])

            fixed, values = seconds(subject.tiny, node_seconds), []
            for sizes in product(*subject.axes):
                # A GPU computes while the host launches what comes next, so each is measured by itself.
                apart = self.device.type == "cuda"
                values.append(fixed + seconds(sizes, device_seconds) if apart else seconds(sizes, node_seconds))
                self.advance(f"{what}: {subject.kind} {name}")
            found.append({
                "kind": subject.kind, "dtype": name, "axes": subject.axes, "seconds": values, "fixed_seconds": fixed
            })  # fmt: skip
        return found

    def _links(self, clock: Clock) -> dict[str, Any]:
        device = JoinOptions(device=self.device.type)
        by_stage, by_replica = (join(mesh, device) for mesh in (Mesh(pp=self.ranks), Mesh(dp=self.ranks)))
        pool = Pool(MAIN[self.device.type], self.device)
        self.advance("messages")
        messages = Messages(self.joined, by_stage, by_replica, pool, clock)
        mine = message_tables(messages)
        everyone = [json.loads(text) for text in self.joined.everyone(json.dumps(mine))]
        return {link: [_slowest(table, [e[link][i] for e in everyone]) for i, table in enumerate(tables)]
                for link, tables in mine.items()}  # fmt: skip


def _slowest(table: dict[str, Any], everyone: list[dict[str, Any]]) -> dict[str, Any]:
    return {**table, "seconds": [max(s) for s in zip(*(t["seconds"] for t in everyone), strict=True)]}


if __name__ == "__main__":
    main()
