"""A profile: seconds are put where they belong, it is kept as JSON, and shown on the plan's page."""

import pytest

from autodist_fx.errors import AutodistError
from autodist_fx.report.page import plan_page
from autodist_fx.report.profile import Profile, phase_profile, profile_sections
from tests.support.plans.examples import small_plan


def node(name, seconds, kind="linear", is_comm=False, waiting=0.0):
    return {"ops": name if isinstance(name, list) else [name], "kind": kind, "is_comm": is_comm, "seconds": seconds,
            "waiting": waiting}  # fmt: skip


def measured(plan, scale):
    """A rank that spends `scale` on a merged product, and 2 and 3 times that on moving and waiting; 10 in all."""
    columns = [op.name for op in plan.ops if op.role == "column"][:2]
    row = next(op.name for op in plan.ops if op.role == "row")
    nodes = [node(columns, scale), node(row, 2 * scale, "all_reduce", True, 3 * scale)]
    return {"seconds": 9 * scale, "timed_seconds": 10 * scale, "program_seconds": 6 * scale, "nodes": nodes,
            "model_seconds": 8 * scale if scale == 1.0 else None}  # fmt: skip


@pytest.fixture
def profile():
    plan = small_plan()
    phases = (phase_profile("decode", [measured(plan, 1.0), measured(plan, 2.0)], plan),)
    return Profile(plan.model, str(plan.mesh), "1 x 8 tokens", phases)


def test_what_a_rank_spends_adds_up(profile):
    (decode,) = profile.phases
    for rank, scale in zip(decode.ranks, (1.0, 2.0), strict=True):
        spent = (rank.ops, rank.waiting, rank.moving, rank.around, rank.outside)
        assert sum(spent) == pytest.approx(10 * scale)
    assert (decode.ranks[0].ops, decode.ranks[0].waiting, decode.ranks[0].moving) == pytest.approx((1, 3, 2))
    assert (decode.ranks[0].around, decode.ranks[0].outside) == pytest.approx((2, 2))
    assert (decode.seconds, decode.timed_seconds) == (18.0, 20.0)


def test_an_op_is_measured_on_its_slowest_rank_and_predicted_by_the_plan(profile):
    plan = small_plan()
    columns = [op for op in plan.ops if op.role == "column"][:2]
    row = next(op for op in plan.ops if op.role == "row")
    by_kind = {op.kind: op for op in profile.phases[0].ops}
    assert by_kind["linear"].seconds == 2.0
    assert by_kind["linear"].predicted == pytest.approx(sum(op.compute_seconds for op in columns))
    assert (by_kind["all_reduce"].seconds, by_kind["all_reduce"].waiting) == (4.0, 6.0)
    assert by_kind["all_reduce"].predicted == pytest.approx(row.comm_seconds)
    assert by_kind["linear"].place.startswith("model.layers.*.") and by_kind["linear"].place.count("|") == 1


def test_it_is_kept_and_shown(profile, tmp_path):
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile
    page = plan_page(small_plan(), profile=profile)
    assert "As it ran" in page and "1 x 8 tokens" in page
    assert all(cell in page for part in profile_sections(profile) for row in part.rows for cell in row)
    assert "As it ran" not in plan_page(small_plan())


def test_a_file_that_is_none_is_refused_in_one_line(tmp_path):
    (tmp_path / "other.json").write_text('{"version": 1, "model": 3}')
    with pytest.raises(AutodistError, match="is no profile"):
        Profile.load(tmp_path / "other.json")
    (tmp_path / "other.json").write_text('{"version": 0}')
    with pytest.raises(AutodistError, match="version 0"):
        Profile.load(tmp_path / "other.json")
    with pytest.raises(AutodistError, match="cannot read"):
        Profile.load(tmp_path / "none.json")
