"""Damaged plan files give an error of one line or a valid plan: never a traceback, never a hang."""

from hypothesis import given, settings
from hypothesis import strategies as st
from plan_examples import small_plan
from plan_mutations import mutated

from cost_model.errors import PlanError
from cost_model.plan_json import plan_from_dict, plan_from_text, plan_to_text


def test_fuzzed_plans_are_refused_or_valid():
    """800 damaged plans: a PlanError of one printable line, or a plan that reads back equal and prints."""
    refused = 0
    for seed in range(800):
        data = mutated(seed)
        try:
            plan = plan_from_dict(data)
        except PlanError as error:
            assert str(error).isprintable(), seed
            refused += 1
            continue
        assert plan_from_text(plan_to_text(plan)) == plan, seed
        assert str(plan).replace("\n", "").isprintable(), seed
        assert max(map(len, str(plan).splitlines())) <= 120, seed
    assert 400 < refused < 800


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 60000), st.binary(max_size=3))
def test_damaged_files_are_refused_or_valid(seed, at, junk):
    """Bytes overwritten or cut off anywhere in the file."""
    raw = plan_to_text(small_plan(2)).encode()
    at %= len(raw)
    raw = raw[:at] + junk + raw[at + len(junk) :] if junk else raw[:at]
    try:
        plan = plan_from_text(raw.decode("utf-8", "replace"))
    except PlanError:
        return
    assert plan_from_text(plan_to_text(plan)) == plan
