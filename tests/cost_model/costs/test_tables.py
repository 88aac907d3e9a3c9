"""Tables give back what was measured, and in between what a law of utilisation says that they were measured by."""

import itertools

import pytest

from cost_model.costs.tables import Table
from tests.support.plans.measured import FIXED, GRID, PEAK, product_bound, table, utilisation

BOUND = product_bound(PEAK, 4)
PRODUCTS = table("linear", "float32", GRID, BOUND, 1)


def seconds(sizes):
    return PRODUCTS.fixed_seconds + BOUND(sizes) / PRODUCTS.utilisation(sizes, BOUND)


def test_a_measured_point_comes_back_as_it_was():
    for sizes, measured in PRODUCTS.points():
        assert seconds(sizes) == pytest.approx(measured, rel=1e-12)


@pytest.mark.parametrize("sizes", [(2, 100, 999), (16, 64, 128), (200, 1000, 65)])
def test_in_between_a_power_law_of_the_sizes_is_met(sizes):
    assert seconds(sizes) == pytest.approx(FIXED + BOUND(sizes) / utilisation(sizes, 1), rel=1e-12)


@pytest.mark.parametrize(("sizes", "border"), [
    ((4096, 4096, 1024), (256, 1024, 1024)),
    ((1, 8, 64), (1, 64, 64)),
])  # fmt: skip
def test_beyond_the_grid_utilisation_stays_what_it_is_at_the_border(sizes, border):
    assert PRODUCTS.utilisation(sizes, BOUND) == pytest.approx(PRODUCTS.utilisation(border, BOUND), rel=1e-12)


def test_a_point_that_is_left_out_is_predicted_by_its_neighbours_alone():
    assert PRODUCTS.left_out((1, 0, 0), BOUND) == pytest.approx(PRODUCTS.at((1, 0, 0)), rel=1e-12)
    assert PRODUCTS.left_out((0, 0, 0), BOUND) is None  # a corner: nothing on its other sides
    wrong = list(PRODUCTS.seconds)
    wrong[4] *= 3  # the point (1, 0, 0) itself
    changed = Table("linear", "float32", GRID, tuple(wrong), FIXED)
    assert changed.at((1, 0, 0)) == pytest.approx(3 * PRODUCTS.at((1, 0, 0)))
    assert changed.left_out((1, 0, 0), BOUND) == pytest.approx(PRODUCTS.at((1, 0, 0)), rel=1e-12)


def test_points_are_in_the_order_of_the_axes():
    assert [sizes for sizes, _ in PRODUCTS.points()] == list(itertools.product(*GRID))


@pytest.mark.parametrize(("axes", "values", "fixed"), [
    (((1.0, 2.0),), (1.0,), 0.0),
    (((2.0, 1.0),), (1.0, 1.0), 0.0),
    (((1.0, 1.0),), (1.0, 1.0), 0.0),
    (((0.0, 1.0),), (1.0, 1.0), 0.0),
    (((1.0, 2.0),), (0.0, 1.0), 0.0),
    (((1.0, 2.0),), (1.0, 1.0), -1.0),
    ((), (), 0.0),
])  # fmt: skip
def test_what_is_no_table_is_refused(axes, values, fixed):
    with pytest.raises(ValueError, match="table of add float32"):
        Table("add", "float32", axes, values, fixed)
