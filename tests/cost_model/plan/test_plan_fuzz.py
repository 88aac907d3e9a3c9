"""Damaged plan files give an error of one line or a valid plan, which everything that prints plans can print."""

import functools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_model.errors import PlanError
from cost_model.explain.breakdown import whole_facts, whole_sections
from cost_model.explain.cut import cut_section
from cost_model.explain.find_ops import find_ops
from cost_model.explain.op import alike, op_sections
from cost_model.partition_plan import PartitionPlan
from cost_model.plan.read_json import plan_from_dict, plan_from_text
from cost_model.plan.write_json import plan_to_text
from cost_model.text_tables import sections_text
from tests.support.graphs.small import Attention, Mlp, Stack, normalized, plan_for
from tests.support.plans.examples import small_plan
from tests.support.plans.mutations import mutated


@functools.cache
def searched_plan():
    """Returns a plan by the searches, with everything that plans have: uneven layouts, hops, cuts, alternatives."""
    layers = [layer for _ in range(2) for layer in (Attention(12, 3, 3, 4), Mlp(12, 24))]
    return plan_for(normalized(Stack(layers), x=("B", "S", 12)), tp=2, pp=2)


def assert_prints(plan, other, seed):
    """In lines of 120 printable characters: show, explain, diff."""
    texts = [str(plan), sections_text([], whole_sections(plan))]
    texts += [sections_text([], [cut_section(plan, k)]) for k in range(len(plan.cuts))]
    whole_facts(plan)
    rng = random.Random(seed)
    for op in rng.sample(plan.ops, min(3, len(plan.ops))):
        for name in (op.name, op.module):
            try:
                groups = alike(plan, find_ops(plan, name))
            except PlanError as error:
                assert str(error).isprintable(), seed
            else:
                texts += [sections_text([], op_sections(plan, ops)) for ops in groups]
    if plan.model == other.model:
        assert bool(plan.diff(other)) == (plan != other)
        texts.append(str(plan.diff(other)))
    for text in texts:
        assert text.replace("\n", "").isprintable(), seed
        assert max(map(len, text.splitlines()), default=0) <= 120, seed


@pytest.mark.parametrize("kind", ["small", "searched"])
def test_fuzzed_plans_are_refused_or_valid(kind):
    """800 damaged plans: a PlanError of one printable line, or a plan that reads back equal and prints."""
    original = small_plan(3) if kind == "small" else searched_plan()
    text = plan_to_text(original) if kind == "searched" else ""
    refused = 0
    for seed in range(500 if kind == "small" else 300):
        data = mutated(seed, text)
        try:
            plan = plan_from_dict(data, PartitionPlan)
        except PlanError as error:
            assert str(error).isprintable(), seed
            refused += 1
            continue
        assert plan_from_text(plan_to_text(plan), PartitionPlan) == plan, seed
        assert_prints(plan, original, seed)
    assert refused > 150


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 60000), st.binary(max_size=3))
def test_damaged_files_are_refused_or_valid(seed, at, junk):
    """Bytes overwritten or cut off anywhere in the file."""
    raw = plan_to_text(small_plan(2)).encode()
    at %= len(raw)
    raw = raw[:at] + junk + raw[at + len(junk) :] if junk else raw[:at]
    try:
        plan = plan_from_text(raw.decode("utf-8", "replace"), PartitionPlan)
    except PlanError:
        return
    assert plan_from_text(plan_to_text(plan), PartitionPlan) == plan


ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "cp037")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_other_encodings(encoding, tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(plan_to_text(small_plan()).encode(encoding))
    try:
        assert PartitionPlan.load(path) == small_plan()
    except PlanError as error:
        assert str(error).isprintable() and "plan.json" in str(error)
        assert encoding not in ("utf-8", "latin-1")  # latin-1 writes ASCII alike


DEEP = ("[" * 10**6, '{"ops":' * 10**5, '{"version": 3, "ops": ' + "[" * 5000 + "]" * 5000 + "}")


@pytest.mark.parametrize("deep", DEEP, ids=["lists", "objects", "closed"])
def test_deep_nesting(deep):
    with pytest.raises(PlanError) as caught:
        plan_from_text(deep, PartitionPlan)
    assert len(str(caught.value)) < 200
