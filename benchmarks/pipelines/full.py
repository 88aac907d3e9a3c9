"""A pipeline that is kept full against the same ranks with one microbatch at a time, and against transformers' own.

Two ranks of one thread each (pp=2), the 125M Llama shape of shapes.py, float32. In every round each piece of work is
done all ways, one after the other; ratios are taken within a round. Beside each stands what the plan expected, said
before it was measured.
"""

import contextlib
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import shapes
import torch
from contenders import transformers_pp
from markdown_table import table
from processes import RankError, Ranks, answer, serve

OTHER_WANTED = 1.5  # times as fast as transformers' pipeline


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
    """Seconds of each round in one microbatch, in several, and of transformers' pipeline (none where it has none); how
    many microbatches those were, and what was expected."""

    work: Work
    one: list[float] = field(default_factory=list)
    many: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)
    count: int = 1
    forecast: float = 1.0  # times as fast
    forecast_seconds: float = 0.0
    agrees: bool = True

    @property
    def ratios(self) -> list[float]:
        """How many times as fast as in one microbatch."""
        return [a / b for a, b in zip(self.one, self.many, strict=True)]

    @property
    def other_ratios(self) -> list[float]:
        """How many times as fast as transformers' pipeline."""
        return [a / b for a, b in zip(self.other, self.many, strict=True)] if self.other else []

    def forget(self) -> None:
        """Forget the seconds so far: programs are made at first use."""
        for seconds in (self.one, self.many, self.other):
            seconds.clear()


def run(names: list[str], rounds: int) -> list[Result]:
    """Start the ranks, and do each piece of work in turns."""
    results = [Result(WORKS[name]) for name in names]
    with tempfile.TemporaryDirectory(prefix="adx-pipeline-") as directory, contextlib.ExitStack() as stack:
        path = Path(directory) / "model"
        shapes.write_checkpoint(shapes.bench_llama(), path)
        ours = _started("ours", path, stack)
        other: Ranks | None = None
        try:
            other = _started("transformers_pp", path, stack)
        except RankError as error:
            print(f"transformers' pipeline: {error}", flush=True)
        for name, result in zip(names, results, strict=True):
            one(ours, other, name, result)
            result.forget()
        for number in range(rounds):
            for name, result in zip(names, results, strict=True):
                one(ours, other, name, result)
            said = ", ".join(f"{r.work.title} {r.ratios[-1]:.2f}x" for r in results)
            print(f"round {number + 1} of {rounds}: {said}", flush=True)
    return results


def _started(who: str, path: Path, stack: contextlib.ExitStack) -> Ranks:
    """Return two ranks, with the model built."""
    log = path.parent / f"{who}.log"
    ranks = Ranks("run.py", ["--pipeline-rank", who, str(path)], 2, 1, log)
    stack.callback(ranks.close)
    ranks.read()
    return ranks


def one(ours: Ranks, other: Ranks | None, name: str, result: Result) -> None:
    """Do a piece of work all ways."""
    found = {}
    for microbatches in (1, "auto"):
        answers = ours.ask("work", name=name, microbatches=microbatches)
        found[microbatches] = answers[-1]  # the last stage's, which decides
    result.one.append(found[1]["seconds"])
    result.many.append(found["auto"]["seconds"])
    result.count, result.forecast = found["auto"]["count"], found["auto"]["gain"]
    result.forecast_seconds = found["auto"]["predicted"]
    result.agrees = result.agrees and found[1]["given"] == found["auto"]["given"]
    if other is not None:
        theirs = other.ask("work", name=name, microbatches=1)[-1]
        result.other.append(theirs["seconds"])
        result.agrees = result.agrees and theirs["given"] == found["auto"]["given"]


def results_table(results: list[Result]) -> str:
    """Format the results as Markdown."""
    header = ["", "microbatches", "one, s", "several, s", "transformers, s", "one / several", "forecast", "wanted"]
    header += ["transformers / several", "wanted", "same"]
    rows = []
    for r in results:
        seconds = [f"{statistics.median(x):.3f}" if x else "-" for x in (r.one, r.many, r.other)]
        same = "yes" if r.agrees else "**no**"
        rows.append([
            r.work.title, str(r.count), *seconds, _spread(r.ratios), f"{r.forecast:.2f}x", f"{r.work.wanted:.2f}x",
            _spread(r.other_ratios), f"{OTHER_WANTED:.2f}x", same,
        ])  # fmt: skip
    return table(header, rows)


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else "-"


class OurRank:
    """One rank of ours: the commands that the controller can give."""

    def __init__(self) -> None:
        self.model: Any = None

    def build(self, path: str) -> dict[str, Any]:
        import autodist_fx as adx

        torch.set_num_threads(1)
        self.model = adx.from_pretrained(path, pp=2, device="cpu", verify=False)
        return {}

    def work(self, name: str, microbatches: int | str) -> dict[str, Any]:
        found = _done(self.model, WORKS[name], microbatches=microbatches)
        used = self.model.in_flight
        filling = used.filling
        return {
            **found,
            "count": used.count,
            "gain": 1.0 if filling is None else filling.gain,
            "predicted": 0.0 if filling is None else filling.seconds,
        }


class TransformersRank:
    """One rank of transformers' own pipeline, which has one microbatch."""

    def __init__(self) -> None:
        self.model: Any = None

    def build(self, path: str) -> dict[str, Any]:
        torch.set_num_threads(1)
        self.model = transformers_pp.build(path).model
        return {}

    def work(self, name: str, microbatches: int) -> dict[str, Any]:
        return _done(self.model, WORKS[name], **({} if WORKS[name].new_tokens else {"use_cache": False}))


@torch.no_grad()
def _done(model: Any, todo: Work, **options: Any) -> dict[str, Any]:
    """Do the work, and return its seconds and what came of it."""
    ids = torch.randint(0, 32000, (todo.rows, todo.tokens), generator=torch.Generator().manual_seed(1))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **options}
    start = time.perf_counter()
    if todo.new_tokens:
        tokens = model.generate(**given, do_sample=False, max_new_tokens=todo.new_tokens)
    else:
        tokens = model(**given).logits.argmax(-1)
    return {"seconds": time.perf_counter() - start, "given": tokens.tolist()}


def serve_rank(who: str, path: str) -> None:
    """Be one of the ranks, of a checkpoint's model."""
    rank = OurRank() if who == "ours" else TransformersRank()
    answer(rank.build, path=path)
    serve({"work": rank.work})
