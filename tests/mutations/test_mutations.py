"""A sample of broken programs: what changes behaviour is refused, what hangs before it runs; see docs/verify.md."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.mutations.mutation import MUTATIONS
from tests.mutations.subjects import subject
from tests.mutations.trial import numeric_verdict, run_mutant, static_verdict

# Few, since each is compiled in every process: heads that are cut apart, biases, segments, a cache, gradients, stages.
SUBJECTS: tuple[tuple[str, tuple[int, int], str], ...] = (
    ("llama", (3, 1), "cache"), ("opt", (2, 2), "forward"), ("phi3", (2, 1), "train"), ("gpt2", (3, 2), "cache"),
    ("bloom", (3, 1), "forward"), ("qwen3", (2, 2), "train"), ("bert", (1, 2), "forward"),
    ("keyed", (2, 1), "train"), ("routed", (2, 1), "train"), ("routed-inside", (2, 1), "train"),
)  # fmt: skip
EACH = 1  # mutants of a kind


@pytest.mark.drawn(5)
@pytest.mark.parametrize("which", SUBJECTS, ids=lambda w: f"{w[0]}-{w[1][0]}x{w[1][1]}-{w[2]}")
def test_correct_programs_are_accepted_and_right(which: Any) -> None:
    made = subject(*which)
    programs = made.programs()
    assert static_verdict(made, programs) == ""
    assert numeric_verdict(made, programs) == ""
    assert made.behaviour(programs) == ""


@pytest.mark.drawn(18)
@pytest.mark.parametrize("kind", MUTATIONS)
def test_mutants_are_refused(kind: str) -> None:
    order = list(SUBJECTS)
    random.Random(kind).shuffle(order)
    found = []
    for seed, which in enumerate(order * 3):
        outcome = run_mutant(kind, subject(*which), seed)
        if outcome is not None:
            found.append(outcome)
        if len(found) == EACH:
            break
    assert found, f"{kind}: nothing in these programs can be broken in this way"
    for one in found:
        assert not one.static.startswith("CRASH"), one.static
        assert not one.missed, f"{one.subject}: {one.what}"
        assert one.behaviour != "hang" or one.static, f"{one.subject}: {one.what}"
