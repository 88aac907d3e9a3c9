"""What the ranks compute: of another tensor, with other numbers, in other shapes, at another time."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from editing import Programs, add_after, calls, with_argument
from mutation import NotHere, mutation, on_ranks, pick, pick_node, said
from torch.fx import Node
from torch.fx.node import map_arg
from torch.nn import functional as F

from passes.fx.arguments import is_tensor, map_tensor_arguments, tensor_arguments
from passes.fx.nodes import op_name
from passes.ops.comm import COMM_OPS
from passes.program.rank_program import RankProgram

_CALLS = ("call_function", "call_method", "call_module")


def _is_call(node: Node) -> bool:
    return node.op in _CALLS and node.target not in COMM_OPS and bool(tensor_arguments(node))


def _set(node: Node, args: Any, kwargs: Any) -> None:
    node.args, node.kwargs = tuple(args), dict(kwargs)


# -- which tensors -----------------------------------------------------------------------------------------------------


def _alike(node: Node, of: Node) -> list[Node]:
    """Tensors made before `node` that look like `of`."""
    wanted, found = of.meta["val"], []
    for n in node.graph.nodes:
        if n is node:
            break
        value = n.meta.get("val")
        if isinstance(value, torch.Tensor) and (value.shape, value.dtype) == (wanted.shape, wanted.dtype):
            found.append(n)
    return [n for n in found if n is not of]


@mutation("operand of another place")
def _(programs: Programs, rng: random.Random) -> str:
    """A tensor of the same shape: the residual before the block, say."""
    program, node = pick_node(programs, rng, _is_call)
    given = tensor_arguments(node)
    slot = rng.randrange(len(given))
    source = pick(rng, _alike(node, given[slot]))
    places = on_ranks(programs, program, node, rng)
    for other, n in places:
        theirs = next((x for x in other.graph_module.graph.nodes if x.name == source.name), None)
        if theirs is not None:
            map_tensor_arguments(n, lambda i, a, theirs=theirs: theirs if i == slot else a)
    return f"{said(places)}: input {slot} is {source.name}"


@mutation("operands swapped")
def _(programs: Programs, rng: random.Random) -> str:
    program, node = pick_node(programs, rng, lambda n: _is_call(n) and len(set(tensor_arguments(n))) > 1)
    given = tensor_arguments(node)
    i, j = rng.sample(range(len(given)), 2)
    if given[i] is given[j]:
        raise NotHere
    places = on_ranks(programs, program, node, rng)
    for _program, n in places:
        own = tensor_arguments(n)
        map_tensor_arguments(n, lambda at, a, own=own: own[{i: j, j: i}.get(at, at)])
    return f"{said(places)}: inputs {i} and {j}"


@mutation("op left out")
def _(programs: Programs, rng: random.Random) -> str:
    """Its users read one of its operands that looks like its result: a residual lost, a rotation not made."""

    def fits(n: Node) -> bool:
        return _is_call(n) and is_tensor(n) and any(
            a.meta["val"].shape == n.meta["val"].shape for a in tensor_arguments(n)
        )  # fmt: skip

    program, node = pick_node(programs, rng, fits)
    slots = [i for i, a in enumerate(tensor_arguments(node)) if a.meta["val"].shape == node.meta["val"].shape]
    slot = rng.choice(slots)
    places = on_ranks(programs, program, node, rng)
    for _program, n in places:
        n.replace_all_uses_with(tensor_arguments(n)[slot])
        n.graph.erase_node(n)
    return said(places)


@mutation("element of a tuple")
def _(programs: Programs, rng: random.Random) -> str:
    """A getitem of the next tensor that an op returns: keys for values, one expert's rows for another's."""

    def fits(n: Node) -> bool:
        return (
            op_name(n) == "getitem" and type(n.args[1]) is int and isinstance(n.args[0], Node)
            and isinstance(n.args[0].meta.get("val"), (tuple, list))
        )  # fmt: skip

    program, node = pick_node(programs, rng, fits)
    size = len(node.args[0].meta["val"])
    index = pick(rng, [i for i in range(size + 1) if i != node.args[1] % size])
    places = on_ranks(programs, program, node, rng)
    for _program, n in places:
        with_argument(n, 1, index)
    return f"{said(places)}: {index}"


@mutation("module of another place")
def _(programs: Programs, rng: random.Random) -> str:
    """Another module of its class and shapes: the linear of the layer before."""

    def shapes(program: RankProgram, n: Node) -> Any:
        module = program.graph_module.get_submodule(str(n.target))
        return type(module), [tuple(p.shape) for p in module.parameters()]

    program, node = pick_node(programs, rng, lambda n: n.op == "call_module")
    others = [
        str(n.target) for n in program.graph_module.graph.nodes
        if n.op == "call_module" and n.target != node.target and shapes(program, n) == shapes(program, node)
    ]  # fmt: skip
    target = pick(rng, others)
    places = on_ranks(programs, program, node, rng)
    for _program, n in places:
        n.target = target
    return f"{said(places)}: {target}"


# -- which op ----------------------------------------------------------------------------------------------------------

_OTHERS: dict[Any, tuple[Any, ...]] = {
    operator.add: (operator.sub, operator.mul), torch.add: (torch.sub,), operator.sub: (operator.add,),
    operator.mul: (operator.add, operator.truediv), torch.mul: (torch.add,), operator.truediv: (operator.mul,),
    operator.neg: (torch.abs,), operator.le: (operator.lt, operator.ge), operator.lt: (operator.le,),
    operator.gt: (operator.ge,), operator.and_: (operator.or_,), F.silu: (F.relu, F.gelu), F.gelu: (F.silu, F.relu),
    F.relu: (F.gelu,), torch.tanh: (torch.sigmoid,), torch.pow: (operator.mul,), F.softmax: (F.log_softmax,),
    torch.cat: (torch.stack,), "cos": ("sin",), "sin": ("cos",), "mean": ("sum",), "sum": ("mean",),
    "exp": ("sqrt",), "masked_fill": ("masked_scatter",), "index_add": ("index_copy",), torch.index_add: (),
    torch.rsqrt: (torch.sqrt,),
}  # fmt: skip


@mutation("another op")
def _(programs: Programs, rng: random.Random) -> str:
    program, node = pick_node(programs, rng, lambda n: n.op != "call_module" and bool(_OTHERS.get(n.target)))
    target = rng.choice(_OTHERS[node.target])
    places = on_ranks(programs, program, node, rng)
    for _program, n in places:
        n.target = target
        if target in (F.relu, torch.sigmoid):
            n.kwargs = {}
    return f"{said(places)}: {getattr(target, '__name__', target)}"


@mutation("another activation module")
def _(programs: Programs, rng: random.Random) -> str:
    """And other settings of a module: the eps of a norm, how a gelu is approximated, the slope of a relu."""

    def settings(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
        if hasattr(module, "eps"):
            yield "eps", module.eps * 1e4
        if hasattr(module, "approximate"):
            yield "approximate", {"none": "tanh", "tanh": "none"}[module.approximate]
        if hasattr(module, "negative_slope"):
            yield "negative_slope", 0.5

    program, node = pick_node(programs, rng, lambda n: n.op == "call_module")
    module = program.graph_module.get_submodule(str(node.target))
    plain = not list(module.parameters())
    choices: list[tuple[str, Any]] = [*settings(module), *([("", torch.nn.Softsign())] if plain else [])]
    name, value = pick(rng, choices)
    places = on_ranks(programs, program, node, rng)
    for p, n in places:
        if name:
            setattr(p.graph_module.get_submodule(str(n.target)), name, value)
        else:
            p.graph_module.set_submodule(str(n.target), value)
    return f"{said(places)}: {name or type(value).__name__} {value if name else ''}"


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
            _set(n, *_with((n.args, n.kwargs), path, new))
    return f"{said(places)}: {new} for {old}"


@mutation("number changed")
def _(programs: Programs, rng: random.Random) -> str:
    """The scale of a softmax, an eps, an exponent."""
    return _change_number(
        programs, rng, _is_call, float, lambda old: old * rng.choice([2.0, 0.5, 1e3, -1.0]) if old else 0.25
    )  # fmt: skip


@mutation("flag turned")
def _(programs: Programs, rng: random.Random) -> str:
    """is_causal, enable_gqa, keepdim."""
    return _change_number(programs, rng, _is_call, bool, lambda old: not old)


_SHAPED = ("reshape", "broadcast_to")


@mutation("size in a view")
def _(programs: Programs, rng: random.Random) -> str:
    return _change_number(
        programs, rng, lambda n: op_name(n) in _SHAPED, int,
        lambda old: rng.choice([old - 1, old + 1, old * 2, -1, 1, max(1, old // 2)]),
    )  # fmt: skip


@mutation("sizes in a view swapped")
def _(programs: Programs, rng: random.Random) -> str:
    program, node = pick_node(programs, rng, lambda n: op_name(n) in _SHAPED and len(n.args[1]) > 1)
    i, j = rng.sample(range(len(node.args[1])), 2)
    places = on_ranks(programs, program, node, rng)
    for _program, n in places:
        shape = list(n.args[1])
        shape[i], shape[j] = shape[j], shape[i]
        with_argument(n, 1, tuple(shape))
    return f"{said(places)}: {i} and {j}"


@mutation("length of the example in a view")
def _(programs: Programs, rng: random.Random) -> str:
    """A batch size or a length as the number that it was while tracing."""
    program, node = pick_node(
        programs, rng, lambda n: op_name(n) in _SHAPED and any(isinstance(s, Node) for s in n.args[1])
    )
    at = pick(rng, [i for i, s in enumerate(node.args[1]) if isinstance(s, Node)])
    places = on_ranks(programs, program, node, rng)
    for _program, n in places:
        shape = list(n.args[1])
        shape[at] = n.meta["val"].shape[at]
        with_argument(n, 1, tuple(shape))
    return said(places)


def _is_slice(node: Node) -> bool:
    return (op_name(node) == "getitem" and bool(list(_numbers(node.args[1], int))) and is_tensor(node)) or (
        op_name(node) in ("narrow", "split", "chunk", "index_select")
    )


@mutation("bounds of a slice or split")
def _(programs: Programs, rng: random.Random) -> str:
    """The share of a fused projection that is the keys', say."""
    return _change_number(
        programs, rng, _is_slice, int, lambda old: rng.choice([old - 1, old + 1, old * 2, -old if old else 1])
    )  # fmt: skip


@mutation("slice shifted")
def _(programs: Programs, rng: random.Random) -> str:
    """Of the same length, elsewhere."""

    def slices(n: Node) -> list[int]:
        if op_name(n) != "getitem" or not is_tensor(n) or not isinstance(n.args[1], tuple):
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


@mutation("dims of an op")
def _(programs: Programs, rng: random.Random) -> str:
    """Of a transpose, a cat, a softmax, a mean."""
    return _change_number(
        programs, rng, lambda n: op_name(n) in _WITH_DIMS, int, lambda old: rng.choice([old - 1, old + 1, -old])
    )  # fmt: skip


@mutation("wrong dtype of a cast")
def _(programs: Programs, rng: random.Random) -> str:
    program, node = pick_node(programs, rng, lambda n: bool(list(_numbers((n.args, n.kwargs), torch.dtype))))
    (path, old), *_rest = _numbers((node.args, node.kwargs), torch.dtype)
    new = pick(rng, [d for d in (torch.float16, torch.bfloat16, torch.int64, torch.bool) if d != old])
    places = on_ranks(programs, program, node, rng)
    for _program, n in places:
        _set(n, *_with((n.args, n.kwargs), path, new))
    return f"{said(places)}: {new}"


@mutation("another length of the inputs")
def _(programs: Programs, rng: random.Random) -> str:
    """The number of sequences for that of tokens, or a length off by one."""
    program, node = pick_node(programs, rng, lambda n: n.target is torch.ops.aten.sym_size.int)
    places = on_ranks(programs, program, node, rng)
    dim = rng.choice([0, 1])
    if node.args[1] != dim and dim < node.args[0].meta["val"].dim():
        for _program, n in places:
            with_argument(n, 1, dim)
        return f"{said(places)}: dim {dim}"
    for _program, n in places:
        more = add_after(n, operator.add, (n, 1))
        n.replace_all_uses_with(more, delete_user_cb=lambda user, more=more: user is not more)
    return f"{said(places)}: and one"


# -- when, and where to ------------------------------------------------------------------------------------------------


@mutation("used before it is made")
def _(programs: Programs, rng: random.Random) -> str:
    """A node before its producer, a recv behind its first user."""
    program, node = pick_node(programs, rng, lambda n: n.op in _CALLS and bool(n.all_input_nodes))
    order = list(node.graph.nodes)
    producer = max(node.all_input_nodes, key=order.index)
    producer.prepend(node)
    return f"{node.name} before {producer.name} on rank {program.rank}"


@mutation("value that the stage has not")
def _(programs: Programs, rng: random.Random) -> str:
    """What another stage computes, in place of what this one does: an input of that name, which nobody gives."""
    if programs[0].mesh.pp == 1:
        raise NotHere
    program, node = pick_node(programs, rng, lambda n: is_tensor(n) and n.op == "call_module")
    places = on_ranks(programs, program, node, rng)
    for _program, n in places:
        first = next(iter(n.graph.nodes))
        with n.graph.inserting_before(first):
            new = n.graph.placeholder(f"{n.name}_elsewhere")
        new.meta = dict(n.meta)
        n.replace_all_uses_with(new)
        n.graph.erase_node(n)
    return said(places)


@mutation("cache layer off by one")
def _(programs: Programs, rng: random.Random) -> str:
    program, node = pick_node(programs, rng, lambda n: n.op == "call_method" and n.target == "update")
    layer = node.args[3] + rng.choice([-1, 1])
    places = on_ranks(programs, program, node, rng)
    for _program, n in places:
        with_argument(n, 3, layer)
    return f"{said(places)}: {layer}"


@mutation("cache layers swapped")
def _(programs: Programs, rng: random.Random) -> str:
    ranks = [p for p in programs if len(calls(p, "update")) > 1]
    program = pick(rng, ranks)
    i, j = sorted(rng.sample(range(len(calls(program, "update"))), 2))
    for p in [p for p in ranks if p.stage == program.stage] if rng.random() < 0.7 else [program]:
        a, b = calls(p, "update")[i], calls(p, "update")[j]
        first, second = a.args[3], b.args[3]
        with_argument(a, 3, second)
        with_argument(b, 3, first)
    return f"{i} and {j} on stage {program.stage}"


@mutation("cache not written, or twice")
def _(programs: Programs, rng: random.Random) -> str:
    program, node = pick_node(programs, rng, lambda n: n.op == "call_method" and n.target == "update")
    twice = rng.random() < 0.5
    places = on_ranks(programs, program, node, rng)
    for _program, n in places:
        if twice:
            with n.graph.inserting_after(n):
                again = n.graph.call_method("update", n.args, dict(n.kwargs))
            again.meta = dict(n.meta)
            continue
        for piece in list(n.users):
            piece.replace_all_uses_with(n.args[1 + piece.args[1]])
            n.graph.erase_node(piece)
        n.graph.erase_node(n)
    return f"{said(places)}{', twice' if twice else ''}"


@mutation("layers of a rank's cache")
def _(programs: Programs, rng: random.Random) -> str:
    """Which layers of the model's cache the rank's own are."""
    program = pick(rng, [p for p in programs if p.cache_layers])
    layers = list(program.cache_layers)
    count = sum(len(p.cache_layers) for p in programs if p.tp_rank == 0)
    at = rng.randrange(len(layers))
    layers[at] = pick(rng, [i for i in range(count) if i != layers[at]])
    for p in [p for p in programs if p.stage == program.stage] if rng.random() < 0.7 else [program]:
        p.cache_layers = tuple(layers)
    return f"{layers} on stage {program.stage}"


@mutation("output lost or renamed")
def _(programs: Programs, rng: random.Random) -> str:
    program, node = pick_node(programs, rng, lambda n: n.op == "output" and bool(n.args[0]))
    name = rng.choice(sorted(node.args[0]))
    rename = rng.random() < 0.5
    places = on_ranks(programs, program, node, rng)
    for _program, n in places:
        kept = {k: v for k, v in n.args[0].items() if k != name}
        n.args = ({**kept, f"{name}_": n.args[0][name]} if rename else kept,)
    return f"{said(places)}: {name}"


@mutation("another output")
def _(programs: Programs, rng: random.Random) -> str:
    program, node = pick_node(programs, rng, lambda n: n.op == "output" and bool(n.args[0]))
    found: list[Node] = []
    map_arg(node.args[0], lambda n: found.append(n) if is_tensor(n) else None)
    old = pick(rng, found)
    new = pick(rng, [a for a in old.all_input_nodes if is_tensor(a)])
    places = on_ranks(programs, program, node, rng)
    for p, n in places:
        theirs = {x.name: x for x in p.graph_module.graph.nodes}
        n.args = map_arg(n.args, lambda x, t=theirs: t.get(new.name, x) if x.name == old.name else x)
    return f"{said(places)}: {new.name} for {old.name}"


@mutation("unread op more")
def _(programs: Programs, rng: random.Random) -> str:
    """Changes no result, unless it writes: what it takes is changed in place."""
    program, node = pick_node(programs, rng, lambda n: is_tensor(n) and n.op == "call_module")
    with node.graph.inserting_after(node):
        new = node.graph.call_method("mul_", (node, 2.0))
    new.meta = dict(node.meta)
    return f"{node.name} on rank {program.rank}, in place"


