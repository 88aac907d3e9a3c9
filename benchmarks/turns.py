"""The contenders in turns: all alive, one computing at a time, in every round each of them once.

What else the machine does then falls on all of them alike, and ratios are taken within a round.
"""

import contextlib
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import shapes
import torch
from contenders import ENTRIES
from processes import RankError, Ranks

NEW_TOKENS = 64
REPEAT = 3  # forward passes a round, of which the median counts
MAX_LOGIT_ERROR = 1e-4  # float32 sums in another order; 3e-6 seen


@dataclass
class Result:
    """One contender's result: seconds of each round, or why there are none."""

    name: str
    error: str | None = None
    forward: list[float] = field(default_factory=list)
    forward_sharded: list[float] = field(default_factory=list)  # logits left where they are
    prefill: list[float] = field(default_factory=list)  # prompt and first token
    decode: list[float] = field(default_factory=list)  # prompt and all tokens
    collectives: dict[str, Any] = field(default_factory=dict)
    logit_error: float = 0.0
    same_tokens: bool = True

    @property
    def agrees(self) -> bool:
        """Same tokens as the single process, and logits that differ by rounding only."""
        return self.same_tokens and self.logit_error < MAX_LOGIT_ERROR

    @property
    def measures(self) -> tuple[list[float], ...]:
        """Everything that contenders are compared in."""
        return self.forward, self.prefill, self.step, self.decode

    @property
    def step(self) -> list[float]:
        """Seconds for one token after the first."""
        return [(d - p) / (NEW_TOKENS - 1) for d, p in zip(self.decode, self.prefill, strict=True)]


def run(names: list[str], rounds: int) -> list[Result]:
    """Start all contenders, check that they agree with the first one that runs whole, and time them."""
    results = {name: Result(name) for name in names}
    with tempfile.TemporaryDirectory(prefix="adx-bench-") as directory, contextlib.ExitStack() as stack:
        root = Path(directory)
        print("write the checkpoint that all load ...", flush=True)
        shapes.write_checkpoint(shapes.bench_llama(), root / "model")
        alive = {}
        for name in names:
            print(f"start {ENTRIES[name].title} ...", flush=True)
            try:
                alive[name] = start(name, root, stack)
            except RankError as error:
                results[name].error = explain(error)
        check(alive, results, root)
        for number in range(rounds):
            if not alive:
                break
            order = list(alive)
            # Another one goes first each round, so that none always runs after the same one.
            order = order[number % len(order) :] + order[: number % len(order)]
            for name in order:
                try:
                    one_round(alive[name], results[name])
                except RankError as error:
                    results[name].error = explain(error)
                    del alive[name]
            print(f"round {number + 1} of {rounds}: " + ", ".join(brief(results[n]) for n in alive), flush=True)
    return list(results.values())


def start(name: str, root: Path, stack: contextlib.ExitStack) -> Ranks:
    """Its processes, with the model built."""
    entry = ENTRIES[name]
    ranks = Ranks("worker.py", [name, str(root / "model")], entry.world_size, entry.threads, root / f"{name}.log")
    stack.callback(ranks.close)
    ranks.read()
    return ranks


def check(alive: dict[str, Ranks], results: dict[str, Result], root: Path) -> None:
    """Same logits and tokens as the one process; also counts collectives. Warms up on the way."""
    reference: torch.Tensor | None = None
    tokens: list[int] = []
    # The single process first, whatever the order asked for.
    for name in sorted(alive, key=lambda name: name != "single"):
        result = results[name]
        print(f"check {ENTRIES[name].title} ...", flush=True)
        try:
            alive[name].ask("save_logits", path=str(root / "logits"))
            decoded = alive[name].ask("decode", new_tokens=NEW_TOKENS)
            result.collectives = alive[name].ask("collectives")[0]
        except RankError as error:
            result.error = explain(error)
            del alive[name]
            continue
        logits = torch.load(root / "logits")
        if reference is None:
            reference, tokens = logits, decoded[0]["tokens"]
        result.logit_error = (logits - reference).abs().max().item()
        result.same_tokens = all(answer["tokens"] == tokens for answer in decoded)


def one_round(ranks: Ranks, result: Result) -> None:
    """The slowest rank's time counts."""
    result.forward.append(slowest(ranks.ask("forward", repeat=REPEAT)))
    if ENTRIES[result.name].sharded_logits:
        result.forward_sharded.append(slowest(ranks.ask("forward", repeat=REPEAT, sharded=True)))
    result.prefill.append(slowest(ranks.ask("decode", new_tokens=1)))
    result.decode.append(slowest(ranks.ask("decode", new_tokens=NEW_TOKENS)))


def slowest(answers: list[dict[str, Any]]) -> float:
    """Seconds of the rank that took longest."""
    return max(answer["seconds"] for answer in answers)


def brief(result: Result) -> str:
    """For the progress line."""
    return f"{result.name} {result.forward[-1] * 1e3:.0f} ms, {NEW_TOKENS / result.decode[-1]:.1f} tok/s"


def explain(error: RankError) -> str:
    """Returns what the table says of a contender that gave no figures."""
    text = str(error)
    missing = "No module named 'autodist_fx" in text or "module 'autodist_fx" in text
    return f"not available: {text}" if missing else f"failed: {text}"
