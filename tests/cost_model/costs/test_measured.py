"""Ops and messages of a measured machine take what its tables say; presets know no utilisation."""

from dataclasses import replace

import pytest

from cost_model.costs.communication import all_gather_seconds, all_reduce_seconds, send_seconds
from cost_model.costs.compute import op_seconds
from cost_model.costs.hardware import CPU_GLOO, H100
from cost_model.graph.op_graph import Op, TensorSpec
from tests.support.plans.measured import (
    BANDWIDTH,
    FIXED,
    HALF_PEAK,
    PEAK,
    TRANSFER,
    attention_bound,
    machine,
    product_bound,
    utilisation,
)

MACHINE = machine()


def spec(*shape, dtype="float32"):
    return TensorSpec(shape, dtype)


def timed(kind, inputs, output, hardware=MACHINE, **attrs):
    return op_seconds(Op("x", kind, attrs=attrs), inputs, (output,), hardware)


def test_a_product_is_looked_up_by_rows_inner_and_columns():
    for ranks in (1, 2):
        got = timed("linear", (spec(4, 8, 512), spec(100, 512)), spec(4, 8, 100), MACHINE.computing(ranks))
        sizes = (32, 512, 100)
        assert got == pytest.approx(FIXED + product_bound(PEAK, 4)(sizes) / utilisation(sizes, ranks), rel=1e-9)


def test_each_of_a_batch_of_products_has_the_rows_of_its_own():
    got = timed("matmul", (spec(6, 32, 512), spec(6, 512, 100)), spec(6, 32, 100))
    bound = max(2 * 6 * 32 * 512 * 100 / PEAK, 4 * 6 * (32 * 512 + 512 * 100 + 32 * 100) / BANDWIDTH)
    assert got == pytest.approx(FIXED + bound / utilisation((32, 512, 100), 1), rel=1e-9)


def test_a_dtype_without_a_table_has_the_utilisation_of_another_and_a_rate_of_its_own():
    sizes, half = (32, 512, 100), (spec(32, 512, dtype="bfloat16"), spec(100, 512, dtype="bfloat16"))
    got = timed("linear", half, spec(32, 100, dtype="bfloat16"))
    assert got == pytest.approx(FIXED + product_bound(HALF_PEAK, 2)(sizes) / utilisation(sizes, 1), rel=1e-9)
    double = (spec(32, 512, dtype="float64"), spec(100, 512, dtype="float64"))
    got = timed("linear", double, spec(32, 100, dtype="float64"))  # a dtype that is not listed runs at float32's rate
    assert got == pytest.approx(FIXED + product_bound(PEAK, 8)(sizes) / utilisation(sizes, 1), rel=1e-9)


def test_attention_is_looked_up_by_queries_keys_and_heads():
    q, k = spec(2, 4, 32, 64), spec(2, 4, 512, 64)
    sizes = (32, 512, 8)
    got = timed("sdpa", (q, k, k), spec(2, 4, 32, 64))
    assert got == pytest.approx(FIXED + attention_bound(sizes) / utilisation((32, 512, 64), 1), rel=1e-9)


@pytest.mark.parametrize("kind", ["add", "mul", "erf", "silu", "tanh", "cat", "contiguous", "opaque.unheard_of"])
def test_other_ops_are_looked_up_by_the_bytes_they_move(kind):
    nbytes = 2 * 4 * 1000 * 50
    got = timed(kind, (spec(1000, 50),), spec(1000, 50))
    assert got == pytest.approx(FIXED + nbytes / BANDWIDTH / utilisation((nbytes,), 1), rel=1e-9)


def test_calls_take_longer_in_a_graph_of_many_kinds():
    small = (spec(1, 1),), spec(1, 1)
    assert timed("add", *small, machine(node_factor=3.0)) - timed("add", *small) == pytest.approx(2 * FIXED)
    assert timed("view", *small, machine(node_factor=3.0)) == pytest.approx(3e-6)


def test_a_device_that_is_dispatched_to_ahead_takes_the_longer_of_its_work_and_the_dispatch():
    ahead = replace(machine(node_factor=3.0), dispatches_ahead=True)
    product = (spec(16, 1024), spec(1024, 1024)), spec(16, 1024)
    work = product_bound(PEAK, 4)((16, 1024, 1024)) / utilisation((16, 1024, 1024), 1)
    assert timed("linear", *product, ahead) == pytest.approx(work, rel=1e-9) and work > 3 * FIXED
    assert timed("add", (spec(1, 1),), spec(1, 1), ahead) == pytest.approx(3 * FIXED)


def test_more_ranks_than_cores_wait_for_each_other():
    args = ("linear", (spec(32, 512), spec(100, 512)), spec(32, 100))
    two, four = (timed(*args, MACHINE.computing(ranks)) for ranks in (2, 4))
    assert four == pytest.approx(2 * two)


def test_between_numbers_of_ranks_that_were_measured_lies_what_lies_between():
    args = ("linear", (spec(32, 512), spec(100, 512)), spec(32, 100))
    few = MACHINE.computing(1)
    wide = machine(cores=8)
    one, two, three, eight = (timed(*args, wide.computing(ranks)) for ranks in (1, 2, 3, 8))
    assert one == timed(*args, few) < two
    assert three == eight == two  # more ranks than were measured, and cores for them all


def test_a_process_alone_has_all_cores_with_what_they_do_to_each_other():
    args = ("linear", (spec(256, 1024), spec(1024, 1024)), spec(256, 1024))
    alone, busy = timed(*args, MACHINE.alone(2)), timed(*args, MACHINE.computing(2))
    assert alone - FIXED == pytest.approx((busy - FIXED) / 2)
    assert MACHINE.alone(2).memory_bytes == 2 * MACHINE.memory_bytes


def test_messages_take_what_was_measured_and_follow_the_formula_beyond():
    tp, pp = MACHINE.tp_link, MACHINE.pp_link
    for nbytes in (1e3, 1e5, 1e7):
        measured = pytest.approx(5e-5 + nbytes / TRANSFER, rel=1e-9)
        assert all_reduce_seconds(nbytes, 2, tp) == measured
        assert all_gather_seconds(nbytes, 2, tp) == measured
        assert send_seconds(nbytes, pp) == measured
    assert all_reduce_seconds(1e6, 2, tp) == pytest.approx(5e-5 + 1e6 / TRANSFER, rel=0.2)
    assert all_gather_seconds(1e7, 4, tp) > all_gather_seconds(1e7, 2, tp)
    assert all_reduce_seconds(1e7, 1, tp) == 0.0
    assert all_reduce_seconds(1e6, 2, pp) > 0  # no table of it: the formula


def test_presets_reach_their_rates_whatever_the_size():
    for preset in (CPU_GLOO, H100):
        assert preset.computing(8) is preset
        assert preset.utilisation(("add",), "float32", (1.0,), lambda table: lambda sizes: 1.0) == 1.0
        assert preset.stream_seconds(1e6) == 1e6 / preset.memory_bandwidth
