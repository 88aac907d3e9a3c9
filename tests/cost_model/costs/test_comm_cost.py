"""Alpha-beta against numbers worked out by hand, and what every formula must obey."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_model.costs.communication import all_gather_seconds, all_reduce_seconds, send_seconds
from cost_model.costs.hardware import CPU_GLOO, PRESETS, Link

RING = Link(latency_seconds=1e-3, bandwidth=1e9, tree=False)
TREE = Link(latency_seconds=1e-3, bandwidth=1e9, launch_seconds=5e-3)
COLLECTIVES = (all_reduce_seconds, all_gather_seconds)


def test_all_reduce_by_hand():
    # 4 ranks, 8 MB: 6 steps of 2 MB, 2 ms each, and 1 ms latency
    assert all_reduce_seconds(8e6, 4, RING) == pytest.approx(6 * (1e-3 + 2e-3))
    # 2 ranks, as nccl-tests counts: bus bytes = 2 (n-1)/n x bytes = bytes
    assert all_reduce_seconds(8e6, 2, RING) == pytest.approx(2 * 1e-3 + 8e-3)
    # a few bytes on 8 ranks: 3 steps of a tree instead of 14 of the ring, and the launch
    assert all_reduce_seconds(0, 8, TREE) == pytest.approx(5e-3 + 3e-3)
    assert all_reduce_seconds(0, 8, RING) == pytest.approx(14e-3)


def test_all_gather_and_send_by_hand():
    assert all_gather_seconds(8e6, 4, RING) == pytest.approx(3 * (1e-3 + 2e-3))
    assert send_seconds(8e6, TREE) == pytest.approx(5e-3 + 1e-3 + 8e-3)


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_one_rank_is_silent(collective):
    assert collective(1e9, 1, TREE) == 0.0


def test_the_measured_all_reduce_of_one_machine():
    """On two ranks as our runtime does it, in shared memory; see hardware.py."""
    for nbytes, measured in ((3 * 1024, 9.8e-6), (64 * 1024, 20e-6), (1024**2, 184e-6), (16 * 1024**2, 2320e-6)):
        assert measured / 2 < all_reduce_seconds(nbytes, 2, CPU_GLOO.tp_link) < measured * 2


@given(
    nbytes=st.integers(0, 2**34),
    more=st.integers(0, 2**34),
    ranks=st.integers(2, 64),
    link=st.sampled_from([p.tp_link for p in PRESETS.values()]),
)
def test_more_bytes_never_cost_less(nbytes, more, ranks, link):
    for collective in COLLECTIVES:
        assert 0 < collective(nbytes, ranks, link) <= collective(nbytes + more, ranks, link)
    # an all_reduce can be had as reduce_scatter and all_gather, which cost the same: no more than both
    both = 2 * all_gather_seconds(nbytes, ranks, link)
    assert all_reduce_seconds(nbytes, ranks, link) <= both * (1 + 1e-9)
