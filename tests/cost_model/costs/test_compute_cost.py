"""FLOPs of each kind against counts made another way (loops over shapes, torch's own counter), and the roofline."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_model.costs.compute import op_bytes, op_flops, op_seconds
from cost_model.costs.hardware import CPU_GLOO, H100
from cost_model.graph.op_graph import Op, TensorSpec

torch = pytest.importorskip("torch")

from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from passes.ops.experts import experts  # noqa: E402

SILU = (("silu", "gate"), ("mul", "%0", "up"))


def f32(*shape):
    return TensorSpec(shape, "float32")


def op(kind, outputs, **attrs):
    return Op("x", kind, outputs=outputs, attrs=attrs)


def flops(kind, inputs, *outputs, **attrs):
    return op_flops(op(kind, outputs, **attrs), inputs, outputs)


def torch_flops(function, *inputs):
    """Returns what torch's own counter says, on tensors without memory."""
    with FlopCounterMode(display=False) as counter:
        function(*(torch.empty(s.shape, device="meta") for s in inputs))
    return counter.get_total_flops()


def test_products_by_hand():
    assert flops("linear", (f32(2, 3, 5), f32(7, 5)), f32(2, 3, 7)) == 2 * 2 * 3 * 5 * 7
    assert flops("linear", (f32(2, 3, 5), f32(7, 5), f32(7)), f32(2, 3, 7)) == 2 * 2 * 3 * 5 * 7
    assert flops("linear", (f32(2, 3, 5), f32(5, 7)), f32(2, 3, 7), transposed=True) == 2 * 2 * 3 * 5 * 7
    assert flops("conv1d", (f32(2, 3, 5), f32(5, 7)), f32(2, 3, 7)) == 2 * 2 * 3 * 5 * 7
    assert flops("opaque.bmm", (f32(2, 3, 5), f32(2, 5, 7)), f32(2, 3, 7)) == 2 * 2 * 3 * 5 * 7
    assert flops("addmm", (f32(7), f32(3, 5), f32(5, 7)), f32(3, 7)) == 2 * 3 * 5 * 7
    assert flops("einsum", (f32(2, 3, 5), f32(5, 7)), f32(2, 3, 7), equation="bsi,io->bso") == 2 * 2 * 3 * 5 * 7


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(1, 7), st.integers(1, 8))
def test_products_as_torch_counts_them(b, m, k, n, t):
    x, w = f32(b, m, k), f32(n, k)
    assert flops("linear", (x, w), f32(b, m, n)) == torch_flops(torch.nn.functional.linear, x, w)
    y = f32(b, k, n)
    assert flops("matmul", (x, y), f32(b, m, n)) == torch_flops(torch.matmul, x, y)
    q, key, value = f32(b, 6, m, k), f32(b, 6, t, k), f32(b, 6, t, n)
    counted = flops("sdpa", (q, key, value), f32(b, 6, m, n)) - 5 * b * 6 * m * t  # the softmax, which torch leaves out
    scores = torch_flops(torch.matmul, q, f32(b, 6, k, t))
    assert counted == scores + torch_flops(torch.matmul, f32(b, 6, m, t), value)


def test_grouped_attention_computes_as_much_but_reads_less():
    q, few, many, out = f32(1, 8, 4, 16), f32(1, 2, 32, 16), f32(1, 8, 32, 16), f32(1, 8, 4, 16)
    assert flops("sdpa", (q, few, few), out) == flops("sdpa", (q, many, many), out)
    assert op_bytes(op("sdpa", (out,)), (q, few, few), (out,)) < op_bytes(op("sdpa", (out,)), (q, many, many), (out,))


def _experts(rows, count, here, chosen=2, hidden=6, inner=4):
    """Returns the op and its inputs on a rank that has `here` of `count` experts."""
    shapes = (rows, hidden), (rows, chosen), (rows, chosen), (here, 2 * inner, hidden), (here, hidden, inner)
    made = op("experts", (f32(rows, hidden),), gate=SILU, parts="halves", experts=count)
    return made, tuple(f32(*shape) for shape in shapes)


def test_routed_experts_as_torch_counts_them():
    made, inputs = _experts(rows=9, count=5, here=5)
    x, index = torch.rand(9, 6), torch.stack([torch.randperm(5)[:2] for _ in range(9)])
    with FlopCounterMode(display=False) as counter:
        weights = torch.rand(5, 8, 6), torch.rand(5, 6, 4)
        experts(x, index, torch.rand(9, 2), *weights, None, None, SILU, "halves", False, 5)
    assert op_flops(made, inputs, made.outputs) == counter.get_total_flops()


def test_routed_experts_cost_what_the_busiest_rank_is_expected_to_do():
    """Compared with tokens sent at random."""
    chosen = torch.stack([torch.randperm(16)[:2] for _ in range(200 * 64)]).view(200, 64 * 2)
    busiest = torch.stack([torch.bincount(each // 4, minlength=4).max() for each in chosen]).double().mean()
    made, inputs = _experts(rows=64, count=16, here=4)
    whole, of_all = _experts(rows=64, count=16, here=16)
    share = op_flops(made, inputs, made.outputs) / op_flops(whole, of_all, whole.outputs)
    assert float(busiest) / 128 == pytest.approx(share, rel=0.15) and share > 1 / 4


def test_experts_without_a_row_cost_nothing():
    few, many = (_experts(rows, 128, 128, chosen=8) for rows in (1, 512))
    seconds = [op_seconds(made, inputs, made.outputs, CPU_GLOO) for made, inputs in (few, many)]
    assert seconds[0] < seconds[1] / 10  # eight of 128 are met
    weights = 8 * (8 * 6 + 6 * 4) * 4
    assert 0.9 * weights < op_bytes(*few, few[0].outputs) < 2 * weights


def test_elementwise_reductions_and_moves():
    assert flops("add", (f32(4, 8), f32(8)), f32(4, 8)) == 32
    assert flops("sum", (f32(4, 8),), f32(4)) == 32
    assert flops("softmax", (f32(4, 8),), f32(4, 8)) == 5 * 32
    for kind in ("view", "cat", "to", "embedding", "input", "param", "cache_update"):
        assert flops(kind, (f32(4, 8),), f32(4, 8)) == 0
    assert flops("anything", ()) == 0


def test_an_embedding_reads_only_the_rows_it_looks_up():
    ids, table, out = TensorSpec((2, 3), "int64"), f32(50000, 16), f32(2, 3, 16)
    for inputs in ((ids, table), (table, ids)):
        assert op_bytes(op("embedding", (out,)), inputs, (out,)) == 2 * 6 * 16 * 4 + 6 * 8


def test_seconds_follow_the_roofline():
    x, w, out = (TensorSpec(s, "bfloat16") for s in ((8192, 8192), (8192, 8192), (8192, 8192)))
    compute_bound = 2 * 8192**3 / H100.flops_of("bfloat16")
    assert op_seconds(op("linear", (out,)), (x, w), (out,), H100) == pytest.approx(compute_bound)
    x, out = TensorSpec((1, 8192), "bfloat16"), TensorSpec((1, 8192), "bfloat16")
    memory_bound = 2 * (8192 * 8192 + 2 * 8192) / H100.memory_bandwidth
    assert op_seconds(op("linear", (out,)), (x, w), (out,), H100) == pytest.approx(memory_bound)


def test_dispatch_is_added_on_a_host_and_hidden_by_a_device():
    """A device computes while the host dispatches the next op: an op takes the longer of both."""
    small, large = f32(8, 8), f32(4096, 4096)
    for tensor in (small, large):
        streamed = 3 * tensor.nbytes
        add = op("add", (tensor,)), (tensor, tensor), (tensor,)
        on_host = streamed / CPU_GLOO.memory_bandwidth + CPU_GLOO.op_seconds
        assert op_seconds(*add, CPU_GLOO) == pytest.approx(on_host, rel=1e-9)
        on_device = max(streamed / H100.memory_bandwidth, H100.op_seconds)
        assert op_seconds(*add, H100) == pytest.approx(on_device, rel=1e-9)


def test_sources_are_free_and_views_cost_their_dispatch():
    big = f32(4096, 4096)
    for kind in ("input", "param", "buffer"):
        assert op_seconds(op(kind, (big,)), (), (big,), H100) == 0.0
    assert op_seconds(op("view", (big,)), (big,), (big,), H100) == H100.view_seconds
    assert op_seconds(op("opaque.narrow", (big,)), (big,), (big,), H100) == H100.view_seconds
    assert op_seconds(op("scalar.sym_size.int", ()), (big,), (), H100) == H100.view_seconds
    assert op_seconds(op("add", (big,)), (big, big), (big,), H100) > H100.op_seconds


def test_a_product_runs_at_the_rate_of_its_inputs():
    slow32 = replace(H100, flops=(("float32", 1e9), ("bfloat16", 1e12)))
    x, w, out = TensorSpec((64, 64), "bfloat16"), TensorSpec((64, 64), "bfloat16"), f32(64, 64)
    assert op_seconds(op("linear", (out,)), (x, w), (out,), slow32) == pytest.approx(
        max(2 * 64**3 / 1e12, slow32.op_seconds)
    )
