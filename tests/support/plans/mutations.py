"""Plans damaged as JSON values, by a seed: fields dropped, exchanged, doubled, and filled with what does not belong."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

from cost_model.plan.write_json import plan_to_text
from tests.support.plans.examples import small_plan

JUNK = (
    None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e308, float("inf"), float("nan"), 2**63, 10**400, "", "R", "P", "S(0)",
    "S(1)", "S(99999999999999999999)", "S(-1)", "S(\u0663)", "\ud800", "\x00", "add_1", "x" * 1000, [], [[]], [0, 1],
    [[0, 1]], ["R"], {}, {"tp": 1}, {"": []},
)  # fmt: skip


def _places(value: Any) -> Any:
    """All (container, key) of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def _mutate(data: Any, rng: random.Random) -> None:
    container, key = rng.choice(list(_places(data)))
    other_container, other_key = rng.choice(list(_places(data)))
    action = rng.randrange(6)
    if action == 0:
        del container[key]
    elif action == 1:
        container[key] = copy.deepcopy(rng.choice(JUNK))
    elif action == 2:  # a value from elsewhere in the plan
        container[key] = copy.deepcopy(other_container[other_key])
    elif action == 3 and isinstance(container, list):
        container.insert(key, copy.deepcopy(rng.choice([container[key], *JUNK])))
    elif action == 4 and isinstance(container, list):
        rng.shuffle(container)
    elif action == 4:
        container[rng.choice(["x", "gather", "layout", ""])] = copy.deepcopy(rng.choice(JUNK))
    elif isinstance(container[key], int) and not isinstance(container[key], bool):
        container[key] += rng.choice([-1, 1, 1000])
    else:
        container[key] = [container[key]]


def mutated(seed: int, text: str = "") -> Any:
    """The plan in `text`, or a small one, with one to five damages."""
    rng = random.Random(seed)
    data = json.loads(text or plan_to_text(small_plan(3, rng.choice([1, 2]), rng.choice([1, 2]))))
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        _mutate(data, rng)
    return data


__all__ = ["mutated"]
