"""backward_inputs and finish: together torch.autograd.grad, each node of the graph run once but for junctions."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from torch.autograd import Function

from autodist_fx.runtime.training.autograd.split_backward import backward_inputs


class Counted(Function):
    """The identity; notes in `calls` each time that its backward runs, as a collective would."""

    @staticmethod
    def forward(ctx, x, name, calls):
        ctx.name, ctx.calls = name, calls
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        ctx.calls.append(ctx.name)
        return gradient.clone(), None, None


def tensors(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def check(make, inputs, parameters):
    """Compares with one torch.autograd.grad; `make(calls)` returns the roots. Returns (calls of the first pass, of the
    second, of the whole)."""
    whole, first = [], []
    roots = make(whole)
    known = [torch.randn_like(r, dtype=torch.float64) for r in roots]
    wanted = torch.autograd.grad(roots, [*inputs, *parameters], known, allow_unused=True)
    got, left = backward_inputs(make(first), known, inputs, parameters)
    before = list(first)
    got += left.finish()
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    return before, first[len(before) :], whole


def test_linears_norms_and_residuals():
    x, *parameters = tensors((3, 5, 8), (8,), (16, 8), (16,), (8, 16), (8,))

    def make(calls):
        scale, w1, b1, w2, b2 = parameters
        h = nn.functional.layer_norm(x, (8,)) * scale
        h = nn.functional.gelu(nn.functional.linear(Counted.apply(h, "in", calls), w1, b1))
        return [x + Counted.apply(nn.functional.linear(h, w2, b2), "out", calls)]

    assert check(make, [x], parameters) == (["out", "in"], [], ["out", "in"])


def test_what_hangs_on_parameters_alone_is_left_for_the_second_pass():
    x, table, w, unused = tensors((4, 6), (7, 6), (6, 6), (3,))

    def make(calls):
        bias = Counted.apply(nn.functional.embedding(torch.arange(4), table), "of parameters", calls)
        return [Counted.apply(x, "of inputs", calls) @ w + bias]

    assert check(make, [x], [table, w, unused])[:2] == (["of inputs"], ["of parameters"])


def test_a_stage_without_inputs_does_all_in_the_second_pass():
    w, v = tensors((6, 6), (6,))

    def make(calls):
        h = Counted.apply(w * v, "h", calls)
        return [h.sum(0), h @ v]

    assert check(make, [], [w, v])[:2] == ([], ["h"])


def test_a_parameter_of_several_junctions_has_its_gradient_at_once_and_nothing_runs_twice():
    x, w, v = tensors((4, 6), (6, 6), (6, 6))

    def make(calls):
        h = Counted.apply(torch.tanh(x @ w), "first", calls)
        return [Counted.apply(torch.tanh(h @ w) @ v, "second", calls)]

    assert check(make, [x], [w, v]) == (["second", "first"], [], ["second", "first"])


def test_several_inputs_and_roots_among_them_leaves():
    x, y, w, v, u = tensors((4, 6), (4, 6), (6, 6), (6, 6), (4, 6))

    def make(calls):
        parts = torch.split(x @ w, 3, dim=1)  # one output of a node is read
        joined = torch.cat([parts[0], torch.sigmoid(y)[:, :3]], 1) @ v
        return [joined, y, x.sum(), u, u * 2.0, (v @ w).sum()]

    check(make, [x, y], [w, v, u])


def test_an_input_that_no_root_depends_on():
    x, y, w = tensors((4, 6), (4, 6), (6, 6))
    check(lambda calls: [x @ w], [x, y], [w])
    gradients, left = backward_inputs([], [], [x, y], [w])
    assert (gradients, left.finish()) == ([None, None], [None])


def test_hooks_on_parameters_fire_once_with_their_gradients():
    """Buckets that are summed while backward goes on take gradients by hooks."""
    x, w, v = tensors((4, 6), (6, 6), (6, 6))
    came = []
    w.register_hook(lambda g: came.append(("w", g.clone())))
    v.register_hook(lambda g: came.append(("v", g.clone())))
    roots = [torch.tanh(x @ w) @ v]
    _, left = backward_inputs(roots, [torch.ones_like(roots[0])], [x], [w, v])
    assert came == []
    found = left.finish()
    assert [name for name, _ in came] == ["v", "w"]  # later ops first
    assert all(torch.equal(g, found[["w", "v"].index(name)]) for name, g in came)


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_recurrent_layer(batch_first):
    """Many outputs of one node, and weights read at every step."""
    torch.manual_seed(0)
    layer = nn.GRU(4, 5, batch_first=batch_first).double()
    (x,) = tensors((3, 2, 4))
    check(lambda calls: [layer(x)[0]], [x], list(layer.parameters()))


def test_what_lies_between_roots_and_junctions_is_let_go():
    x, w = tensors((4, 6), (6, 6))
    kept: list[str] = type("Calls", (list,), {})()  # a list that can be referred to weakly
    alive = weakref.ref(kept)
    roots = [Counted.apply(x @ w, "loss", kept).sum()]
    del kept
    gradients, left = backward_inputs(roots, [torch.ones_like(roots[0])], [x], [w])
    assert alive() is not None
    del roots
    assert alive() is None
    torch.testing.assert_close([*gradients, *left.finish()], [w.sum(1).expand(4, 6), x.sum(0)[:, None].expand(6, 6)])


def test_gradients_do_not_change_in_the_hands_of_the_second_pass():
    """A gradient that is both noted at a junction and passed on is not added into."""
    x, w, b = tensors((4, 6), (6, 6), (4, 6))

    def make(calls):
        h = x + b  # its node passes one gradient on to both
        return [h @ w + h, h * 2.0]

    check(make, [x], [w, b])
