"""Liveness against traces worked out by hand, and against a slow count that asks at each step who is still needed."""

from hypothesis import given
from hypothesis import strategies as st

from cost_model.costs.memory import kv_cache_bytes, last_uses, peak_activation_bytes, peak_live_bytes
from cost_model.graph.op_graph import Op, TensorRef, TensorSpec


def test_a_chain_holds_two_at_a_time():
    # a 10, b 20, c 5: a+b while b is computed, then b+c
    assert peak_live_bytes("abc", {"a": 10, "b": 20, "c": 5}, {"a": 1, "b": 2}) == 30


def test_a_residual_is_held_across():
    assert peak_live_bytes("abcd", {"a": 10, "b": 20, "c": 5, "d": 10}, {"a": 3, "b": 2, "c": 3}) == 35


def test_nothing():
    assert peak_live_bytes("", {}, {}) == 0
    assert peak_live_bytes("ab", {}, {"a": 1}) == 0


def test_a_view_keeps_its_base_alive():
    reads = {"v": ["a"], "w": ["v"], "b": ["a"], "c": ["w"]}
    assert last_uses("avwbc", reads, {"v", "w"}) == {"a": 4, "v": 4, "w": 4}
    assert last_uses("avwbc", reads, {"v"}) == {"a": 3, "v": 2, "w": 4}


def test_what_is_kept_lives_to_the_end_also_through_a_view():
    assert last_uses("avb", {"v": ["a"]}, {"v"}, kept=["v"]) == {"a": 2, "v": 2}


@st.composite
def programs(draw):
    n = draw(st.integers(1, 12))
    order = [f"n{i}" for i in range(n)]
    reads = {name: draw(st.lists(st.sampled_from(order[:i]), max_size=3)) if i else [] for i, name in enumerate(order)}
    views = {name for name in order if reads[name] and draw(st.booleans())}
    kept = draw(st.lists(st.sampled_from(order), max_size=2))
    produces = {name: 0 if name in views else draw(st.integers(0, 100)) for name in order}
    return order, reads, views, kept, produces


@given(programs())
def test_as_a_slow_count_has_it(program):
    order, reads, views, kept, produces = program

    def needed(name, step):
        """Is `name` read after `step`, or at it, by an op, or by an op through views of it?"""
        if name in kept:
            return True
        for later, reader in enumerate(order):
            if name in reads[reader] and (later >= step or (reader in views and needed(reader, step))):
                return True
        return False

    peak = 0
    for step, now in enumerate(order):
        peak = max(peak, sum(produces[x] for x in order[: step + 1] if x == now or needed(x, step)))
    assert peak_live_bytes(order, produces, last_uses(order, reads, views, kept)) == peak


def test_a_stage():
    spec = (TensorSpec((1,), "float32"),)
    ops = [
        Op("w", "param", (), spec),
        Op("h", "linear", (TensorRef("x"), TensorRef("w")), spec),
        Op("v", "view", (TensorRef("h"),), spec),
        Op("kv", "cache_update", (TensorRef("v"), TensorRef("v")), spec * 2),
        Op("y", "add", (TensorRef("x"), TensorRef("kv", 1)), spec),
    ]
    nbytes = {"w": 1000, "x": 7, "h": 10, "v": 10, "kv": 40, "y": 5}
    # x arrives and stays; h lives until the cache has it, which is counted by itself
    peak = peak_activation_bytes(ops, lambda ref: nbytes[ref.op], [TensorRef("y")], [TensorRef("x")])
    assert peak == 7 + 10
    assert kv_cache_bytes(ops, lambda ref: nbytes[ref.op]) == 80
