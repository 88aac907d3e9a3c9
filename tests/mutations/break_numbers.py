"""Mutations of numbers: sizes, bounds, dims, dtypes and flags of a node."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Node

from passes.fx import node_meta
from passes.fx.nodes import op_name
from tests.mutations.break_nodes import is_call, set_arguments
from tests.mutations.mutation import NotHere, mutation, on_ranks, pick, pick_node, said
from tests.support.graphs.broken_programs import Programs, add_after, with_argument

# -- which numbers -----------------------------------------------------------------------------------------------------


def _numbers(value: Any, kind: type, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(path, number) of each number of that type anywhere in arguments."""
    if type(value) is kind:
        yield path, value
    elif isinstance(value, (tuple, list)):
        for i, v in enumerate(value):
            yield from _numbers(v, kind, (*path, i))
    elif isinstance(value, dict):
        for k, v in value.items():
            yield from _numbers(v, kind, (*path, k))
    elif isinstance(value, slice):
        for k in ("start", "stop", "step"):
            yield from _numbers(getattr(value, k), kind, (*path, k))


def _with(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """`value` with `new` at the path."""
    if not path:
        return new
    first, *rest = path
    if isinstance(value, dict):
        return {**value, first: _with(value[first], tuple(rest), new)}
    if isinstance(value, slice):
        bounds = {k: getattr(value, k) for k in ("start", "stop", "step")}
        bounds[first] = _with(bounds[first], tuple(rest), new)
        return slice(bounds["start"], bounds["stop"], bounds["step"])
    changed = list(value)
    changed[first] = _with(changed[first], tuple(rest), new)
    return type(value)(changed)


def _change_number(
    programs: Programs, rng: random.Random, fits: Callable[[Node], bool], kind: type, change: Callable[[Any], Any]
) -> str:
    def numbers(n: Node) -> list[tuple[tuple[Any, ...], Any]]:
        return list(_numbers((n.args, n.kwargs), kind))

    program, node = pick_node(programs, rng, lambda n: fits(n) and bool(numbers(n)))
    path, old = rng.choice(numbers(node))
    new = change(old)
    places = on_ranks(programs, program, node, rng)
    for _program, n in places:
        if dict(numbers(n)).get(path) == old:
            set_arguments(n, *_with((n.args, n.kwargs), path, new))
    return f"{said(places)}: {new} for {old}"


@mutation
def number_changed(programs: Programs, rng: random.Random) -> str:
    """The scale of a softmax, an eps, an exponent."""
    return _change_number(
        programs, rng, is_call, float, lambda old: old * rng.choice([2.0, 0.5, 1e3, -1.0]) if old else 0.25
    )  # fmt: skip


@mutation
def flag_turned(programs: Programs, rng: random.Random) -> str:
    """is_causal, enable_gqa, keepdim."""
    return _change_number(programs, rng, is_call, bool, lambda old: not old)


_SHAPED = ("reshape", "broadcast_to")


@mutation
def size_in_a_view(programs: Programs, rng: random.Random) -> str:
    return _change_number(
        programs, rng, lambda n: op_name(n) in _SHAPED, int,
        lambda old: rng.choice([old - 1, old + 1, old * 2, -1, 1, max(1, old // 2)]),
    )  # fmt: skip


@mutation
def sizes_in_a_view_swapped(programs: Programs, rng: random.Random) -> str:
    program, node = pick_node(programs, rng, lambda n: op_name(n) in _SHAPED and len(n.args[1]) > 1)
    i, j = rng.sample(range(len(node.args[1])), 2)
    places = on_ranks(programs, program, node, rng)
    for _program, n in places:
        shape = list(n.args[1])
        shape[i], shape[j] = shape[j], shape[i]
        with_argument(n, 1, tuple(shape))
    return f"{said(places)}: {i} and {j}"


@mutation
def length_of_the_example_in_a_view(programs: Programs, rng: random.Random) -> str:
    """A batch size or a length as the number that it was while tracing."""
    program, node = pick_node(
        programs, rng, lambda n: op_name(n) in _SHAPED and any(isinstance(s, Node) for s in n.args[1])
    )
    at = pick(rng, [i for i, s in enumerate(node.args[1]) if isinstance(s, Node)])
    places = on_ranks(programs, program, node, rng)
    for _program, n in places:
        shape = list(n.args[1])
        shape[at] = node_meta.tensor(n).shape[at]
        with_argument(n, 1, tuple(shape))
    return said(places)


def _is_slice(node: Node) -> bool:
    return (op_name(node) == "getitem" and bool(list(_numbers(node.args[1], int))) and node_meta.is_tensor(node)) or (
        op_name(node) in ("narrow", "split", "chunk", "index_select")
    )


@mutation
def bounds_of_a_slice_or_split(programs: Programs, rng: random.Random) -> str:
    """The share of a fused projection that is the keys', say."""
    return _change_number(
        programs, rng, _is_slice, int, lambda old: rng.choice([old - 1, old + 1, old * 2, -old if old else 1])
    )  # fmt: skip


@mutation
def slice_shifted(programs: Programs, rng: random.Random) -> str:
    """Moves a slice of the same length elsewhere."""

    def slices(n: Node) -> list[int]:
        if op_name(n) != "getitem" or not node_meta.is_tensor(n) or not isinstance(n.args[1], tuple):
            return []
        return [i for i, s in enumerate(n.args[1]) if isinstance(s, slice) and (s.start or s.stop)]

    program, node = pick_node(programs, rng, lambda n: bool(slices(n)))
    at = rng.choice(slices(node))
    step = rng.choice([-8, -1, 1, 8])
    places = on_ranks(programs, program, node, rng)
    for _program, n in places:
        own = n.args[1][at]
        if type(own.start) not in (int, type(None)) or type(own.stop) not in (int, type(None)):
            raise NotHere
        new = slice((own.start or 0) + step, None if own.stop is None else own.stop + step, own.step)
        with_argument(n, 1, tuple(new if i == at else s for i, s in enumerate(n.args[1])))
    return f"{said(places)}: {step}"


_WITH_DIMS = (
    "transpose", "permute", "unsqueeze", "squeeze", "cat", "stack", "softmax", "sum", "mean", "cumsum", "topk",
    "swapaxes", "index_add", "unbind",
)  # fmt: skip


@mutation
def dims_of_an_op(programs: Programs, rng: random.Random) -> str:
    """Changes the dims of a transpose, a cat, a softmax, a mean."""
    return _change_number(
        programs, rng, lambda n: op_name(n) in _WITH_DIMS, int, lambda old: rng.choice([old - 1, old + 1, -old])
    )  # fmt: skip


@mutation
def wrong_dtype_of_a_cast(programs: Programs, rng: random.Random) -> str:
    program, node = pick_node(programs, rng, lambda n: bool(list(_numbers((n.args, n.kwargs), torch.dtype))))
    (path, old), *_rest = _numbers((node.args, node.kwargs), torch.dtype)
    new = pick(rng, [d for d in (torch.float16, torch.bfloat16, torch.int64, torch.bool) if d != old])
    places = on_ranks(programs, program, node, rng)
    for _program, n in places:
        set_arguments(n, *_with((n.args, n.kwargs), path, new))
    return f"{said(places)}: {new}"


@mutation
def another_length_of_the_inputs(programs: Programs, rng: random.Random) -> str:
    """The number of sequences for that of tokens, or a length off by one."""
    program, node = pick_node(programs, rng, lambda n: n.target is torch.ops.aten.sym_size.int)
    places = on_ranks(programs, program, node, rng)
    dim = rng.choice([0, 1])
    if node.args[1] != dim and dim < node_meta.tensor(node.args[0]).dim():
        for _program, n in places:
            with_argument(n, 1, dim)
        return f"{said(places)}: dim {dim}"
    for _program, n in places:
        more = add_after(n, operator.add, (n, 1))
        n.replace_all_uses_with(more, delete_user_cb=lambda user, more=more: user is not more)
    return f"{said(places)}: and one"
