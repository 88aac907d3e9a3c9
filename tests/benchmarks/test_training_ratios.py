"""The table of `make bench` on training, of figures made up by hand."""

from __future__ import annotations

from fine_tuning.ratios import Group, Other, results_table


def group(**changes: object) -> Group:
    found = Group("tp=2", "ours", 4, 128, (Other("theirs", "another way", 1.3), Other("dead", "one that died", 1.0)))
    found.seconds = {"ours": [1.0, 2.0, 1.0], "theirs": [1.5, 2.0, 2.0]}
    found.losses = {"ours": [4.0, 3.0], "theirs": [4.0001, 3.0]}
    found.errors = {"dead": "rank 0: died"}
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def test_ratios_are_taken_within_a_round() -> None:
    _, _, first, second = results_table([group()]).strip().splitlines()
    assert [cell.strip() for cell in first.strip("|").split("|")] == [
        "tp=2, 4 x 128", "another way", "1.00", "2.00", "1.50x (1.00-2.00)", "1.30x", "yes",
    ]  # fmt: skip
    assert "| -" in second and "rank 0: died" in second


def test_losses_that_differ_by_more_than_rounding_are_said() -> None:
    assert group().agrees
    assert not group(losses={"ours": [4.0, 3.0], "theirs": [4.0, 3.01]}).agrees
    assert "**no**" in results_table([group(losses={"ours": [4.0], "theirs": [4.1]})])
