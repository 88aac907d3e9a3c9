"""Breaks correct programs in every way that tests/mutations knows, and counts what `verify` says of them.

    python benchmarks/mutations.py                                  everything; writes docs/verify.md
    python benchmarks/mutations.py --mutants 5 --kinds send,recv    some, to look at (docs/verify.md stays as it is)

Results are kept as lines of JSON beside the page. A later run with --resume takes kinds found before, and writes the
page of all.

Whether a mutant behaves otherwise is told by running it against transformers' own model. Exit code 1 where verify
missed one that does, did not see a hang before it ran, or refused a correct program.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.mutations.correct import correct_programs  # noqa: E402
from tests.mutations.mutation import MUTATIONS  # noqa: E402
from tests.mutations.subjects import subject, subjects  # noqa: E402
from tests.mutations.trial import Outcome, run_mutant  # noqa: E402

COLUMNS = ("mutants", "programs", "equivalent", "change behaviour", "hang", "static", "numeric", "both", "missed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=50, help="of each kind that change behaviour (%(default)s)")
    parser.add_argument("--correct", type=int, default=200, help="correct programs to be accepted (%(default)s)")
    parser.add_argument("--kinds", default="", help="only those whose name holds one of these, by commas")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes (%(default)s)")
    parser.add_argument("--out", type=Path, default=None, help="page to put the table into")
    parser.add_argument("--resume", action="store_true", help="keep the kinds and the correct programs found before")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parts = [part for part in arguments.kinds.split(",") if part]
    kinds = [kind for kind in MUTATIONS if not parts or any(part in kind for part in parts)]
    out = arguments.out or (None if parts and not arguments.resume else ROOT / "docs" / "verify.md")
    console, began = Console(width=180), time.perf_counter()
    lines = None if out is None else out.with_suffix(".jsonl")
    outcomes, correct = read(lines) if lines is not None and arguments.resume else ({}, None)
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        if correct is None:
            correct = pool.submit(correct_programs, arguments.correct)
        todo = [kind for kind in kinds if kind not in outcomes]
        running = {pool.submit(mutants, kind, arguments.mutants): kind for kind in todo}
        for done in as_completed(running):
            kind, found = running[done], done.result()
            outcomes[kind] = found
            console.print(f"{kind:48}", *(f"{name} {n}," for name, n in zip(COLUMNS, summary(found), strict=True)))
            for one in found:
                if one.missed or (one.behaviour == "hang" and not one.static) or one.static.startswith("CRASH"):
                    console.print("   NOT SEEN", one.behaviour, one.subject, one.what, one.static, one.numeric[:200])
            if lines is not None:
                write(lines, outcomes, None)
        alarms = correct if isinstance(correct, tuple) else correct.result()
    for alarm in alarms[1]:
        console.print("FALSE ALARM", alarm)
    outcomes = {kind: outcomes[kind] for kind in MUTATIONS if kind in outcomes}
    everything = [one for found in outcomes.values() for one in found]
    verdict = conclusion(everything, *alarms)
    console.print(table(outcomes))
    console.print(verdict, f"({(time.perf_counter() - began) / 60:.0f} minutes)")
    if out is not None and lines is not None:
        write(lines, outcomes, alarms)
        write_page(out, outcomes, verdict)
    unseen = [o for o in everything if o.missed or (o.behaviour == "hang" and not o.static)]
    return int(bool(unseen or alarms[1]))


def read(lines: Path) -> tuple[dict[str, list[Outcome]], tuple[int, list[str]] | None]:
    outcomes: dict[str, list[Outcome]] = {}
    correct = None
    for line in lines.read_text("utf-8").splitlines() if lines.exists() else ():
        found = json.loads(line)
        if "correct" in found:
            correct = found["correct"], found["alarms"]
        else:
            outcomes.setdefault(found["kind"], []).append(Outcome(**found))
    return outcomes, correct


def write(lines: Path, outcomes: dict[str, list[Outcome]], correct: tuple[int, list[str]] | None) -> None:
    found: list[object] = [asdict(one) for of_kind in outcomes.values() for one in of_kind]
    if correct is not None:
        found.append({"correct": correct[0], "alarms": correct[1]})
    lines.write_text("".join(json.dumps(one) + "\n" for one in found), "utf-8")


def table(outcomes: dict[str, list[Outcome]]) -> Table:
    made = Table("kind", *COLUMNS)
    for kind, found in outcomes.items():
        made.add_row(kind, *map(str, summary(found)))
    return made


def mutants(kind: str, wanted: int) -> list[Outcome]:
    """Until so many of them change behaviour, or none more are to be had. Always the same ones."""
    order = subjects()
    random.Random(kind).shuffle(order)
    found: list[Outcome] = []
    seed, changed = 0, 0
    useless: Counter[tuple[str, tuple[int, int], str]] = Counter()
    while changed < wanted and len(useless) < len(order) and len(found) < 6 * wanted:
        which = order[seed % len(order)]
        seed += 1
        outcome = None if useless[which] else run_mutant(kind, subject(*which), seed)
        if outcome is None:
            useless[which] += 1
            continue
        found.append(outcome)
        changed += bool(outcome.behaviour)
    return found


def summary(found: list[Outcome]) -> tuple[int, ...]:
    changed = [one for one in found if one.behaviour]
    static, numeric = ([bool(getattr(one, name)) for one in changed] for name in ("static", "numeric"))
    return (
        len(found),
        len({one.subject for one in found}),
        len(found) - len(changed),
        len(changed),
        sum(one.behaviour == "hang" for one in changed),
        sum(static),
        sum(numeric),
        sum(a and b for a, b in zip(static, numeric, strict=True)),
        sum(one.missed for one in changed),
    )


def conclusion(found: list[Outcome], correct: int, alarms: list[str]) -> str:
    changed = [one for one in found if one.behaviour]
    hangs = [one for one in changed if one.behaviour == "hang"]
    static = sum(bool(one.static) for one in changed)
    numeric = sum(bool(one.numeric) for one in changed)
    either = sum(not one.missed for one in changed)
    return (
        f"{len(found)} mutants of {len({one.kind for one in found})} kinds, of which {len(changed)} change behaviour: "
        f"{static} of these are refused by the static proof, {numeric} by the numeric check, {either} by one of them. "
        f"{sum(bool(one.static) for one in hangs)} of {len(hangs)} that hang are refused before they run. "
        + (f"Of {correct} correct programs {len(alarms)} are refused." if correct else "")
    )


_MARK = "<!-- what follows is written by benchmarks/mutations.py -->"


def write_page(out: Path, outcomes: dict[str, list[Outcome]], verdict: str) -> None:
    """Everything above the mark is kept."""
    kept = out.read_text("utf-8").partition(_MARK)[0] if out.exists() else ""
    lines = [_MARK, "", verdict, "", "| kind | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    lines += [f"| {kind} | " + " | ".join(map(str, summary(found))) + " |" for kind, found in outcomes.items()]
    out.write_text(kept + "\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
