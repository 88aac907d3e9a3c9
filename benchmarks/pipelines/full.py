"""A pipeline that is kept full against the same ranks with one microbatch at a time.

Two ranks of one thread each (pp=2), the 125M Llama shape of shapes.py, float32. In every round each piece of work is
done both ways, one after the other; ratios are taken within a round. Beside each stands what the plan expected, said
before it was measured.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import shapes
import torch
from markdown_table import table
from processes import Ranks, answer, serve


@dataclass(frozen=True)
class Work:
    """A piece of work: rows of a prompt of so many tokens, from which `new_tokens` are generated (0: scored whole)."""

    title: str
    rows: int
    tokens: int
    new_tokens: int
    wanted: float  # times as fast as with one microbatch


WORKS = {
    "scoring": Work("scoring 16 x 128", 16, 128, 0, 1.6),
    "prefill": Work("prefill 8 x 256", 8, 256, 1, 1.5),
    "decode": Work("decode of 32 rows", 32, 16, 24, 1.35),
    "prompt": Work("one prompt of 2048", 1, 2048, 1, 1.3),
}


@dataclass
class Result:
    """Seconds of each round in one microbatch and in several, how many those were, and what was expected."""

    work: Work
    one: list[float] = field(default_factory=list)
    many: list[float] = field(default_factory=list)
    count: int = 1
    forecast: float = 1.0  # times as fast
    forecast_seconds: float = 0.0
    agrees: bool = True

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.one, self.many, strict=True)]


def run(names: list[str], rounds: int) -> list[Result]:
    """Start the ranks, and do each piece of work in turns."""
    results = [Result(WORKS[name]) for name in names]
    with tempfile.TemporaryDirectory(prefix="adx-pipeline-") as directory:
        root = Path(directory)
        shapes.write_checkpoint(shapes.bench_llama(), root / "model")
        ranks = Ranks("run.py", ["--pipeline-rank", str(root / "model")], 2, 1, root / "ranks.log")
        try:
            ranks.read()
            for name, result in zip(names, results, strict=True):
                one(ranks, name, result)  # programs are made at first use
            for result in results:
                result.one.clear(), result.many.clear()
            for number in range(rounds):
                for name, result in zip(names, results, strict=True):
                    one(ranks, name, result)
                said = ", ".join(f"{r.work.title} {r.ratios[-1]:.2f}x" for r in results)
                print(f"round {number + 1} of {rounds}: {said}", flush=True)
        finally:
            ranks.close()
    return results


def one(ranks: Ranks, name: str, result: Result) -> None:
    """Do a piece of work both ways."""
    found = {}
    for microbatches in (1, "auto"):
        answers = ranks.ask("work", name=name, microbatches=microbatches)
        found[microbatches] = answers[-1]  # the last stage's, which decides
    result.one.append(found[1]["seconds"])
    result.many.append(found["auto"]["seconds"])
    result.count, result.forecast = found["auto"]["count"], found["auto"]["gain"]
    result.forecast_seconds = found["auto"]["predicted"]
    result.agrees = result.agrees and found[1]["given"] == found["auto"]["given"]


def results_table(results: list[Result]) -> str:
    """Format the results as Markdown."""
    header = ["", "microbatches", "one, s", "several, s", "as fast", "forecast", "wanted", "same"]
    rows = []
    for r in results:
        spread = f"{statistics.median(r.ratios):.2f}x ({min(r.ratios):.2f}-{max(r.ratios):.2f})"
        one_s, many = statistics.median(r.one), statistics.median(r.many)
        same = "yes" if r.agrees else "**no**"
        rows.append([
            r.work.title, str(r.count), f"{one_s:.3f}", f"{many:.3f}", spread, f"{r.forecast:.2f}x",
            f"{r.work.wanted:.2f}x", same,
        ])  # fmt: skip
    return table(header, rows)


class Rank:
    """One rank: the commands that the controller can give."""

    def __init__(self) -> None:
        self.model: Any = None

    def build(self, path: str) -> dict[str, Any]:
        import autodist_fx as adx

        torch.set_num_threads(1)
        self.model = adx.from_pretrained(path, pp=2, device="cpu", verify=False)
        return {}

    @torch.no_grad()
    def work(self, name: str, microbatches: int | str) -> dict[str, Any]:
        todo = WORKS[name]
        ids = torch.randint(0, 32000, (todo.rows, todo.tokens), generator=torch.Generator().manual_seed(1))
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "microbatches": microbatches}
        start = time.perf_counter()
        if todo.new_tokens:
            tokens = self.model.generate(**given, do_sample=False, max_new_tokens=todo.new_tokens)
        else:
            tokens = self.model(**given).logits.argmax(-1)
        seconds = time.perf_counter() - start
        used = self.model.in_flight
        filling = used.filling
        return {
            "seconds": seconds,
            "given": tokens.tolist(),
            "count": used.count,
            "gain": 1.0 if filling is None else filling.gain,
            "predicted": 0.0 if filling is None else filling.seconds,
        }


def serve_rank(path: str) -> None:
    """Be one of the ranks, of a checkpoint's model."""
    rank = Rank()
    answer(rank.build, path=path)
    serve({"work": rank.work})
