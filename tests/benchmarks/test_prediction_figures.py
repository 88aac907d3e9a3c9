"""The figures of benchmarks/predictions.py, of points whose figures are known."""

import pytest
from predicting.figures import ninth_decile, order_of_plans, regrets, spearman
from predicting.points import Point


def point(way: str, predicted: float, measured: float, shape: str = "a") -> Point:
    return Point(shape, way, "forward", predicted, measured)


def test_spearman_is_of_ranks_and_ties_share_theirs() -> None:
    assert spearman([(1, 10), (2, 100), (3, 1000)]) == pytest.approx(1.0)
    assert spearman([(1, 3), (2, 2), (3, 1)]) == pytest.approx(-1.0)
    assert spearman([(1, 1), (2, 2), (2, 3), (4, 4)]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)


def test_plans_are_ordered_among_those_for_the_same_work() -> None:
    """A shape that all plans are predicted twice too fast for is in order all the same; one that is upside down is
    not."""
    right = [point("tp", 1, 1), point("pp", 2, 2), point("tp", 5, 10, "b"), point("pp", 20, 40, "b")]
    assert order_of_plans(right) == pytest.approx(1.0)
    wrong = [point("tp", 1, 2), point("pp", 2, 1), point("tp", 5, 40, "b"), point("pp", 20, 10, "b")]
    assert order_of_plans(wrong) == pytest.approx(-1.0)


def test_regret_is_what_the_choice_by_predictions_costs() -> None:
    points = [point("tp", 1, 3), point("pp", 2, 2), point("tp", 1, 1, "b"), point("pp", 2, 2, "b")]
    assert regrets(points) == pytest.approx([0.5, 0.0])


def test_errors_have_a_sign_and_the_ninth_decile_is_near_the_largest() -> None:
    assert point("tp", 1, 2).error == -0.5
    assert ninth_decile([n / 10 for n in range(11)]) == pytest.approx(0.9)
    assert ninth_decile([0.5]) == 0.5
