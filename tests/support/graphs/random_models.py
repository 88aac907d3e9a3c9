"""Random modules made of the ops that have rules, on sizes that divide by nothing; and random plans for them.

A search finds one plan of many. With random costs it finds any of them, so that the passes and `verify` meet ways to
shard that no real model's best plan has.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

from cost_model.search.strategy import Strategy
from cost_model.search.tensor_parallel import TensorParallelSearch

Shape = tuple[Any, ...]  # "B", "S", and numbers


@contextlib.contextmanager
def random_costs(seed: int) -> Iterator[None]:
    """While it lasts, computing an op in this or that way takes some random time."""

    def seconds(self: TensorParallelSearch, op: Any, strategy: Strategy) -> float:
        return random.Random(f"{seed} {op.name} {strategy}").random() * 1e-3

    with mock.patch.object(TensorParallelSearch, "compute_seconds", seconds):
        yield


@dataclass
class _Step:
    run: Callable[..., Any]
    inputs: tuple[int, ...]
    text: str


@dataclass
class _Writer:
    """The program so far: `shapes[i]` is the shape of value i; value 0 is the input."""

    rng: random.Random
    module: nn.Module
    shapes: list[Shape]
    steps: list[_Step] = field(default_factory=list)

    def pick(self, fits: Callable[[Shape], bool] = lambda s: True) -> int | None:
        """A value of a shape that fits, most likely a late one."""
        found = [i for i, s in enumerate(self.shapes) if fits(s)]
        if not found:
            return None
        return found[-1 - min(int(self.rng.expovariate(0.7)), len(found) - 1)]

    def dim(self, shape: Shape, least: int = 1) -> int | None:
        """A dim with a constant size."""
        dims = [d for d, n in enumerate(shape) if isinstance(n, int) and n >= least]
        return self.rng.choice(dims) if dims else None

    def add(self, text: str, inputs: tuple[int, ...], shapes: list[Shape], run: Callable[..., Any]) -> None:
        self.steps.append(_Step(run, inputs, f"{text} {inputs} -> {shapes}"))
        self.shapes += shapes

    def keep(self, thing: nn.Module | nn.Parameter) -> str:
        name = f"m{len(self.steps)}" if isinstance(thing, nn.Module) else f"p{len(self.steps)}"
        setattr(self.module, name, thing)
        return name


def _linear(w: _Writer) -> None:
    i = w.pick(lambda s: isinstance(s[-1], int))
    if i is None:
        return
    n, out = w.shapes[i][-1], w.rng.randint(1, 13)
    name = w.keep(nn.Linear(n, out, bias=w.rng.random() < 0.5))
    w.add("linear", (i,), [(*w.shapes[i][:-1], out)], lambda m, b, s, x: getattr(m, name)(x))


def _functional_linear(w: _Writer) -> None:
    i = w.pick(lambda s: isinstance(s[-1], int))
    if i is None:
        return
    n, out = w.shapes[i][-1], w.rng.randint(1, 13)
    name = w.keep(nn.Parameter(torch.randn(out, n) / n**0.5))
    w.add("F.linear", (i,), [(*w.shapes[i][:-1], out)], lambda m, b, s, x: F.linear(x, getattr(m, name)))


def _scaled(w: _Writer) -> None:
    """By a parameter, as norms do."""
    i = w.pick(lambda s: isinstance(s[-1], int))
    if i is None:
        return
    name = w.keep(nn.Parameter(torch.randn(w.shapes[i][-1])))
    shift = w.rng.random() < 0.5
    run = (lambda m, b, s, x: x + getattr(m, name)) if shift else (lambda m, b, s, x: getattr(m, name) * x)
    w.add("shift" if shift else "scale", (i,), [w.shapes[i]], run)


def _unary(w: _Writer) -> None:
    i = w.pick()
    name, f = w.rng.choice([
        ("tanh", torch.tanh), ("relu", torch.relu), ("silu", F.silu), ("neg", lambda x: -x),
        ("half", lambda x: x * 0.5), ("over", lambda x: 2 / (x.abs() + 1)),
        ("plus", lambda x: x + 0.25), ("div", lambda x: x / 3), ("square", lambda x: torch.tanh(x).pow(2)),
        ("minus", lambda x: 1 - x), ("clone", lambda x: x.clone()), ("sigmoid", torch.sigmoid),
        ("abs", lambda x: x.abs()), ("gelu", F.gelu), ("clamp", lambda x: x.clamp(-1.0, 1.0)),
    ])  # fmt: skip
    w.add(name, (i,), [w.shapes[i]], lambda m, b, s, x: f(x))


def _binary(w: _Writer) -> None:
    i = w.pick()
    shape = w.shapes[i]
    # the same shape, or one that broadcasts to it
    j = w.pick(lambda t: len(t) <= len(shape) and all(a in (1, b) for a, b in zip(t[::-1], shape[::-1])))
    if j is None:
        return
    name, f = w.rng.choice([
        ("add", lambda x, y: x + y), ("add", torch.add), ("sub", lambda x, y: x - y),
        ("mul", lambda x, y: torch.tanh(x) * y),
        ("maximum", torch.maximum), ("rsub", lambda x, y: y - x), ("div", lambda x, y: x / (y.abs() + 1)),
        ("where", lambda x, y: torch.where(x > 0.1234, x, y)),
    ])  # fmt: skip
    w.add(name, (i, j), [shape], lambda m, b, s, x, y: f(x, y))


def _split_dim(w: _Writer) -> None:
    """view: one dim becomes two."""
    i = w.pick(lambda s: len(s) < 5 and any(isinstance(n, int) and n > 1 for n in s))
    if i is None:
        return
    shape = w.shapes[i]
    d = w.dim(shape, 2)
    n = shape[d]
    a = w.rng.choice([k for k in range(1, n + 1) if n % k == 0])
    new = (*shape[:d], a, n // a, *shape[d + 1 :])
    w.add("view", (i,), [new], lambda m, b, s, x: x.reshape(_lengths(new, b, s)))


def _merge_dims(w: _Writer) -> None:
    def places(s: Shape) -> list[int]:
        return [d for d in range(len(s) - 1) if isinstance(s[d], int) and isinstance(s[d + 1], int)]

    i = w.pick(lambda s: bool(places(s)))
    if i is None:
        return
    shape = w.shapes[i]
    d = w.rng.choice(places(shape))
    new = (*shape[:d], shape[d] * shape[d + 1], *shape[d + 2 :])
    if w.rng.random() < 0.3:
        w.add("flatten", (i,), [new], lambda m, b, s, x: x.flatten(d, d + 1))
    else:
        w.add("merge", (i,), [new], lambda m, b, s, x: x.reshape(_lengths(new, b, s)))


def _lengths(shape: Shape, b: Any, s: Any) -> tuple[Any, ...]:
    return tuple({"B": b, "S": s}.get(n, n) for n in shape)


def _transpose(w: _Writer) -> None:
    i = w.pick(lambda s: len(s) > 1)
    if i is None:
        return
    shape = list(w.shapes[i])
    if w.rng.random() < 0.5:
        c, d = w.rng.sample(range(len(shape)), 2)
        shape[c], shape[d] = shape[d], shape[c]
        w.add("transpose", (i,), [tuple(shape)], lambda m, b, s, x: x.transpose(c, d))
    else:
        order = w.rng.sample(range(len(shape)), len(shape))
        w.add("permute", (i,), [tuple(shape[d] for d in order)], lambda m, b, s, x: x.permute(*order))


def _pieces(w: _Writer) -> None:
    i = w.pick(lambda s: any(isinstance(n, int) and n > 1 for n in s))
    if i is None:
        return
    shape = w.shapes[i]
    d = w.dim(shape, 2)
    n = shape[d]
    how = w.rng.choice(["split", "chunk", "sizes", "unbind"])
    if how == "unbind":
        if n > 4 or len(shape) < 2:
            return
        rest = (*shape[:d], *shape[d + 1 :])
        w.add("unbind", (i,), [rest] * n, lambda m, b, s, x: tuple(x.unbind(d)[k] for k in range(n)))
        return
    if how == "sizes":
        first = w.rng.randint(1, n - 1)
        sizes = [first, n - first]
        made: Callable[[Any], Any] = lambda x: x.split(sizes, d)  # noqa: E731
    elif how == "split":
        each = w.rng.randint((n + 2) // 3, n)
        sizes = [min(each, n - k) for k in range(0, n, each)]
        made = lambda x: torch.split(x, each, dim=d)  # noqa: E731
    else:
        each = -(-n // 2)
        sizes = [each, n - each]
        made = lambda x: x.chunk(2, dim=d)  # noqa: E731
    news = [(*shape[:d], k, *shape[d + 1 :]) for k in sizes]

    def run(m: nn.Module, b: Any, s: Any, x: Any) -> Any:
        parts = made(x)
        return tuple(parts[k] for k in range(len(sizes)))

    w.add(how, (i,), news, run)


def _joined(w: _Writer) -> None:
    i = w.pick(lambda s: any(isinstance(n, int) for n in s))
    if i is None:
        return
    shape = w.shapes[i]
    if w.rng.random() < 0.3 and len(shape) < 5:
        j = w.pick(lambda t: t == shape)
        d = w.rng.randint(0, len(shape))
        new = (*shape[:d], 2, *shape[d:])
        w.add("stack", (i, j), [new], lambda m, b, s, x, y: torch.stack((x, y), dim=d))
        return
    d = w.dim(shape)

    def joins(t: Shape) -> bool:
        rest = (*shape[:d], *shape[d + 1 :])
        return len(t) == len(shape) and isinstance(t[d], int) and (*t[:d], *t[d + 1 :]) == rest

    j = w.pick(joins)
    assert j is not None  # itself at least
    new = (*shape[:d], shape[d] + w.shapes[j][d], *shape[d + 1 :])
    w.add("cat", (i, j), [new], lambda m, b, s, x, y: torch.cat([x, y], dim=d))


def _sliced(w: _Writer) -> None:
    i = w.pick(lambda s: any(isinstance(n, int) and n > 1 for n in s))
    if i is None:
        return
    shape = w.shapes[i]
    d = w.dim(shape, 2)
    n = shape[d]
    before: tuple[Any, ...] = (slice(None),) * d
    if w.rng.random() < 0.25 and len(shape) > 1:
        at = w.rng.randint(-n, n - 1)
        w.add("select", (i,), [(*shape[:d], *shape[d + 1 :])], lambda m, b, s, x: x[(*before, at)])
        return
    start = w.rng.randint(0, n - 1)
    stop = w.rng.randint(start + 1, n)
    step = w.rng.choice([1, 1, 1, 2])
    cut = slice(w.rng.choice([start, start - n]), w.rng.choice([stop, stop - n]) if stop < n else None, step)
    index = (*before, cut) if d < len(shape) - 1 or w.rng.random() < 0.5 else (..., cut)
    new = (*shape[:d], len(range(start, stop, step)), *shape[d + 1 :])
    w.add("slice", (i,), [new], lambda m, b, s, x: x[index])


def _sizes_of_one(w: _Writer) -> None:
    i = w.pick(lambda s: len(s) < 5)
    shape = w.shapes[i]
    ones = [d for d, n in enumerate(shape) if n == 1]
    if ones and w.rng.random() < 0.5:
        d = w.rng.choice(ones)
        if w.rng.random() < 0.5 and len(shape) > 1:
            w.add("squeeze", (i,), [(*shape[:d], *shape[d + 1 :])], lambda m, b, s, x: x.squeeze(d))
        else:
            n = w.rng.randint(2, 5)
            new = (*shape[:d], n, *shape[d + 1 :])
            w.add("expand", (i,), [new], lambda m, b, s, x: x.expand(*_lengths(new, b, s)))
        return
    d = w.rng.randint(0, len(shape))
    w.add("unsqueeze", (i,), [(*shape[:d], 1, *shape[d:])], lambda m, b, s, x: x.unsqueeze(d))


def _repeated(w: _Writer) -> None:
    i = w.pick(lambda s: any(isinstance(n, int) and n < 6 for n in s))
    if i is None:
        return
    shape = w.shapes[i]
    d, times = w.rng.choice([d for d, n in enumerate(shape) if isinstance(n, int) and n < 6]), w.rng.randint(2, 3)
    new = (*shape[:d], shape[d] * times, *shape[d + 1 :])
    w.add("repeat_interleave", (i,), [new], lambda m, b, s, x: x.repeat_interleave(times, dim=d))


def _along(w: _Writer) -> None:
    i = w.pick(lambda s: any(isinstance(n, int) for n in s))
    if i is None:
        return
    shape = w.shapes[i]
    d = w.dim(shape)
    name, f = w.rng.choice([
        ("softmax", lambda x: torch.softmax(x, d)), ("F.softmax", lambda x: F.softmax(x, dim=d)),
        ("cumsum", lambda x: x.cumsum(d)), ("flip", lambda x: x.flip(d)), ("log_softmax", lambda x: x.log_softmax(d)),
    ])  # fmt: skip
    w.add(name, (i,), [shape], lambda m, b, s, x: f(x))


def _reduced(w: _Writer) -> None:
    i = w.pick(lambda s: len(s) > 1 and any(isinstance(n, int) for n in s))
    if i is None:
        return
    shape = w.shapes[i]
    d, keep = w.dim(shape), w.rng.random() < 0.5
    name = w.rng.choice(["sum", "mean", "mean", "amax", "var"])
    if name == "var" and shape[d] < 2:
        name = "sum"
    new = (*shape[:d], 1, *shape[d + 1 :]) if keep else (*shape[:d], *shape[d + 1 :])
    w.add(name, (i,), [new], lambda m, b, s, x: getattr(x, name)(dim=d, keepdim=keep))


def _normed(w: _Writer) -> None:
    i = w.pick(lambda s: isinstance(s[-1], int) and s[-1] > 1)
    if i is None:
        return
    n = w.shapes[i][-1]
    if w.rng.random() < 0.5:
        name = w.keep(nn.LayerNorm(n))
        w.add("layer_norm", (i,), [w.shapes[i]], lambda m, b, s, x: getattr(m, name)(x))
    else:
        name = w.keep(nn.Parameter(torch.randn(n)))
        w.add(
            "rms", (i,), [w.shapes[i]],
            lambda m, b, s, x: getattr(m, name) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1)),
        )  # fmt: skip


def _product(w: _Writer) -> None:
    i = w.pick(lambda s: len(s) > 2)
    if i is None:
        return
    shape = w.shapes[i]
    j = w.pick(lambda t: len(t) == len(shape) and t[:-2] == shape[:-2] and t[-1] == shape[-1])
    if j is None:
        return
    new = (*shape[:-1], w.shapes[j][-2])
    w.add("matmul", (i, j), [new], lambda m, b, s, x, y: torch.tanh(x @ y.transpose(-1, -2)))


def _attention(w: _Writer) -> None:
    """Heads of one value's last dim attend to each other, grouped or not."""
    i = w.pick(lambda s: len(s) == 3 and s[:2] == ("B", "S"))
    if i is None:
        return
    kv, each, size = w.rng.randint(1, 4), w.rng.randint(1, 3), w.rng.randint(1, 3)
    heads, n = kv * each, w.shapes[i][-1]
    if not isinstance(n, int):
        return
    names = [w.keep(nn.Linear(n, heads * size))]
    for k in range(2):
        setattr(w.module, f"{names[0]}_{k}", nn.Linear(n, kv * size, bias=bool(k)))
        names.append(f"{names[0]}_{k}")
    gqa, causal = w.rng.random() < 0.5, w.rng.random() < 0.5

    def run(m: nn.Module, b: Any, s: Any, x: Any) -> Any:
        q, k, v = (
            getattr(m, name)(x).view(b, s, count, size).transpose(1, 2)
            for name, count in zip(names, (heads, kv, kv), strict=True)
        )
        if not gqa:
            k, v = k.repeat_interleave(each, 1), v.repeat_interleave(each, 1)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)
        return a.transpose(1, 2).reshape(b, s, heads * size)

    w.add(f"attention {heads}/{kv}x{size}", (i,), [("B", "S", heads * size)], run)


_KINDS = (
    (_linear, 5), (_functional_linear, 2), (_scaled, 2), (_unary, 4), (_binary, 6), (_split_dim, 4), (_merge_dims, 4),
    (_transpose, 3), (_pieces, 3), (_joined, 3), (_sliced, 3), (_sizes_of_one, 2), (_repeated, 2), (_along, 2),
    (_reduced, 3), (_normed, 2), (_product, 2), (_attention, 2),
)  # fmt: skip


class RandomModule(nn.Module):
    """x [B, S, `width`] -> some of its values."""

    def __init__(self, seed: int, steps: int = 12) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.width = rng.randint(2, 9)
        writer = _Writer(rng, self, [("B", "S", self.width)])
        makers, weights = zip(*_KINDS, strict=True)
        _linear(writer)
        while len(writer.steps) < steps:
            rng.choices(makers, weights)[0](writer)
        self.steps = writer.steps
        last = len(writer.shapes) - 1
        self.returned = sorted({last, rng.randint(1, last)})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        batch, seq = x.shape[0], x.shape[1]
        values = [x]
        for step in self.steps:
            made = step.run(self, batch, seq, *(values[i] for i in step.inputs))
            values += made if isinstance(made, tuple) else [made]
        return {f"y{i}": values[i] for i in self.returned}

    def text(self) -> str:
        return "\n".join([f"x [B, S, {self.width}]", *(s.text for s in self.steps), f"returns {self.returned}"])
