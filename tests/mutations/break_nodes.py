"""Mutations of what the ranks compute: of another tensor, with other numbers, in other shapes, at another time."""

from __future__ import annotations

import operator
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg
from torch.nn import functional as F

from passes.fx import node_meta
from passes.fx.arguments import map_tensor_arguments, tensor_arguments
from passes.fx.nodes import op_name
from passes.ops.comm import COMM_OPS
from passes.program.rank_program import RankProgram
from tests.mutations.mutation import NotHere, mutation, on_ranks, pick, pick_node, said
from tests.support.graphs.broken_programs import Programs, calls, with_argument

_CALLS = ("call_function", "call_method", "call_module")


def is_call(node: Node) -> bool:
    return node.op in _CALLS and node.target not in COMM_OPS and bool(tensor_arguments(node))


def set_arguments(node: Node, args: Any, kwargs: Any) -> None:
    node.args, node.kwargs = tuple(args), dict(kwargs)


# -- which tensors -----------------------------------------------------------------------------------------------------


def _alike(node: Node, of: Node) -> list[Node]:
    """Tensors made before `node` that look like `of`."""
    wanted, found = node_meta.val(of), []
    for n in node.graph.nodes:
        if n is node:
            break
        value = node_meta.val(n)
        if isinstance(value, torch.Tensor) and (value.shape, value.dtype) == (wanted.shape, wanted.dtype):
            found.append(n)
    return [n for n in found if n is not of]


@mutation
def operand_of_another_place(programs: Programs, rng: random.Random) -> str:
    """A tensor of the same shape: the residual before the block, say."""
    program, node = pick_node(programs, rng, is_call)
    given = tensor_arguments(node)
    slot = rng.randrange(len(given))
    source = pick(rng, _alike(node, given[slot]))
    places = on_ranks(programs, program, node, rng)
    for other, n in places:
        theirs = next((x for x in other.graph_module.graph.nodes if x.name == source.name), None)
        if theirs is not None:
            map_tensor_arguments(n, lambda i, a, theirs=theirs: theirs if i == slot else a)
    return f"{said(places)}: input {slot} is {source.name}"


@mutation
def operands_swapped(programs: Programs, rng: random.Random) -> str:
    program, node = pick_node(programs, rng, lambda n: is_call(n) and len(set(tensor_arguments(n))) > 1)
    given = tensor_arguments(node)
    i, j = rng.sample(range(len(given)), 2)
    if given[i] is given[j]:
        raise NotHere
    places = on_ranks(programs, program, node, rng)
    for _program, n in places:
        own = tensor_arguments(n)
        map_tensor_arguments(n, lambda at, a, own=own: own[{i: j, j: i}.get(at, at)])
    return f"{said(places)}: inputs {i} and {j}"


@mutation
def op_left_out(programs: Programs, rng: random.Random) -> str:
    """Its users read one of its operands that looks like its result: a residual lost, a rotation not made."""

    def fits(n: Node) -> bool:
        return is_call(n) and node_meta.is_tensor(n) and any(
            node_meta.tensor(a).shape == node_meta.tensor(n).shape for a in tensor_arguments(n)
        )  # fmt: skip

    program, node = pick_node(programs, rng, fits)
    shape = node_meta.tensor(node).shape
    slots = [i for i, a in enumerate(tensor_arguments(node)) if node_meta.tensor(a).shape == shape]
    slot = rng.choice(slots)
    places = on_ranks(programs, program, node, rng)
    for _program, n in places:
        n.replace_all_uses_with(tensor_arguments(n)[slot])
        n.graph.erase_node(n)
    return said(places)


@mutation
def element_of_a_tuple(programs: Programs, rng: random.Random) -> str:
    """A getitem of the next tensor that an op returns: keys for values, one expert's rows for another's."""

    def fits(n: Node) -> bool:
        return (
            op_name(n) == "getitem" and type(n.args[1]) is int and isinstance(n.args[0], Node)
            and isinstance(node_meta.val(n.args[0]), (tuple, list))
        )  # fmt: skip

    program, node = pick_node(programs, rng, fits)
    size = len(node_meta.val(node.args[0]))
    index = pick(rng, [i for i in range(size + 1) if i != node.args[1] % size])
    places = on_ranks(programs, program, node, rng)
    for _program, n in places:
        with_argument(n, 1, index)
    return f"{said(places)}: {index}"


@mutation
def module_of_another_place(programs: Programs, rng: random.Random) -> str:
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


@mutation
def another_op(programs: Programs, rng: random.Random) -> str:
    program, node = pick_node(programs, rng, lambda n: n.op != "call_module" and bool(_OTHERS.get(n.target)))
    target = rng.choice(_OTHERS[node.target])
    places = on_ranks(programs, program, node, rng)
    for _program, n in places:
        n.target = target
        if target in (F.relu, torch.sigmoid):
            n.kwargs = {}
    return f"{said(places)}: {getattr(target, '__name__', target)}"


@mutation
def another_activation_module(programs: Programs, rng: random.Random) -> str:
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


# -- when, and where to ------------------------------------------------------------------------------------------------


@mutation
def used_before_it_is_made(programs: Programs, rng: random.Random) -> str:
    """A node before its producer, a recv behind its first user."""
    program, node = pick_node(programs, rng, lambda n: n.op in _CALLS and bool(n.all_input_nodes))
    order = list(node.graph.nodes)
    producer = max(node.all_input_nodes, key=order.index)
    producer.prepend(node)
    return f"{node.name} before {producer.name} on rank {program.rank}"


@mutation
def value_that_the_stage_has_not(programs: Programs, rng: random.Random) -> str:
    """Reads what another stage computes, in place of what this one does: an input of that name, which nobody gives."""
    if programs[0].mesh.pp == 1:
        raise NotHere
    program, node = pick_node(programs, rng, lambda n: node_meta.is_tensor(n) and n.op == "call_module")
    places = on_ranks(programs, program, node, rng)
    for _program, n in places:
        first = next(iter(n.graph.nodes))
        with n.graph.inserting_before(first):
            new = n.graph.placeholder(f"{n.name}_elsewhere")
        node_meta.copy(n, new)
        n.replace_all_uses_with(new)
        n.graph.erase_node(n)
    return said(places)


@mutation
def cache_layer_off_by_one(programs: Programs, rng: random.Random) -> str:
    program, node = pick_node(programs, rng, lambda n: n.op == "call_method" and n.target == "update")
    layer = node.args[3] + rng.choice([-1, 1])
    places = on_ranks(programs, program, node, rng)
    for _program, n in places:
        with_argument(n, 3, layer)
    return f"{said(places)}: {layer}"


@mutation
def cache_layers_swapped(programs: Programs, rng: random.Random) -> str:
    ranks = [p for p in programs if len(calls(p, "update")) > 1]
    program = pick(rng, ranks)
    i, j = sorted(rng.sample(range(len(calls(program, "update"))), 2))
    for p in [p for p in ranks if p.stage == program.stage] if rng.random() < 0.7 else [program]:
        a, b = calls(p, "update")[i], calls(p, "update")[j]
        first, second = a.args[3], b.args[3]
        with_argument(a, 3, second)
        with_argument(b, 3, first)
    return f"{i} and {j} on stage {program.stage}"


@mutation
def cache_not_written_or_twice(programs: Programs, rng: random.Random) -> str:
    program, node = pick_node(programs, rng, lambda n: n.op == "call_method" and n.target == "update")
    twice = rng.random() < 0.5
    places = on_ranks(programs, program, node, rng)
    for _program, n in places:
        if twice:
            with n.graph.inserting_after(n):
                again = n.graph.call_method("update", n.args, dict(n.kwargs))
            node_meta.copy(n, again)
            continue
        for piece in list(n.users):
            piece.replace_all_uses_with(n.args[1 + piece.args[1]])
            n.graph.erase_node(piece)
        n.graph.erase_node(n)
    return f"{said(places)}{', twice' if twice else ''}"


@mutation
def layers_of_a_rank_s_cache(programs: Programs, rng: random.Random) -> str:
    """Which layers of the model's cache the rank's own are."""
    program = pick(rng, [p for p in programs if p.cache_layers])
    layers = list(program.cache_layers)
    count = sum(len(p.cache_layers) for p in programs if p.tp_rank == 0)
    at = rng.randrange(len(layers))
    layers[at] = pick(rng, [i for i in range(count) if i != layers[at]])
    for p in [p for p in programs if p.stage == program.stage] if rng.random() < 0.7 else [program]:
        p.cache_layers = tuple(layers)
    return f"{layers} on stage {program.stage}"


@mutation
def output_lost_or_renamed(programs: Programs, rng: random.Random) -> str:
    program, node = pick_node(programs, rng, lambda n: n.op == "output" and bool(n.args[0]))
    name = rng.choice(sorted(node.args[0]))
    rename = rng.random() < 0.5
    places = on_ranks(programs, program, node, rng)
    for _program, n in places:
        kept = {k: v for k, v in n.args[0].items() if k != name}
        n.args = ({**kept, f"{name}_": n.args[0][name]} if rename else kept,)
    return f"{said(places)}: {name}"


@mutation
def another_output(programs: Programs, rng: random.Random) -> str:
    program, node = pick_node(programs, rng, lambda n: n.op == "output" and bool(n.args[0]))
    found: list[Node] = []
    map_arg(node.args[0], lambda n: found.append(n) if node_meta.is_tensor(n) else None)
    old = pick(rng, found)
    new = pick(rng, [a for a in old.all_input_nodes if node_meta.is_tensor(a)])
    places = on_ranks(programs, program, node, rng)
    for p, n in places:
        theirs = {x.name: x for x in p.graph_module.graph.nodes}
        n.args = map_arg(n.args, lambda x, t=theirs: t.get(new.name, x) if x.name == old.name else x)
    return f"{said(places)}: {new.name} for {old.name}"


@mutation
def unread_op_more(programs: Programs, rng: random.Random) -> str:
    """Changes no result, unless it writes: what it takes is changed in place."""
    program, node = pick_node(programs, rng, lambda n: node_meta.is_tensor(n) and n.op == "call_module")
    with node.graph.inserting_after(node):
        new = node.graph.call_method("mul_", (node, 2.0))
    node_meta.copy(node, new)
    return f"{node.name} on rank {program.rank}, in place"


