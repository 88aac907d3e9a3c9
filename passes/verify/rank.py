"""Interprets one rank's graph: for every node which tensor of the model it stands for, and what of it the rank has.

    q_proj : S(2) 0:32 of q_proj       since the rank holds rows 0:32 of its weight, and the whole of its input
    view   : S(2) 0:4 of view          since these are whole heads; and reshape(..., (batch, seq, 4, 8)) says so too
    o_proj : P of o_proj               since input and weight are cut alike along what is summed over
    all_reduce : R of o_proj

Nothing is taken from the plan: a node's arguments have to be what the model's op reads, its rule has to allow how they
lie, and its own arguments have to give the local shape that follows; what follows is then held against the plan. Every
step speaks of this rank alone. What all ranks of a group owe to each other is noted here and checked in groups.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch.fx import Node

from cost_model.errors import VerificationError
from cost_model.graph.op_graph import SOURCES, Op, TensorRef
from passes.fx import node_meta
from passes.fx.arguments import argument, fetch, submodule, tensor_arguments
from passes.fx.nodes import op_name
from passes.ops.comm import log_sum_exp
from passes.program.rank_program import RankProgram
from passes.verify.core.held import PARTIAL, WHOLE, Derivation, Held
from passes.verify.core.meta_shapes import Tensor
from passes.verify.core.report import Duty, fail
from passes.verify.core.state import RankFacts, RankState, Tools, Value, named
from passes.verify.nodes.comm_nodes import EXCHANGES
from passes.verify.nodes.derive import check_shape, derived
from passes.verify.nodes.experts import (
    check_owner,
    is_joined,
    is_term,
    joined,
    part_elsewhere,
    passed_over,
    picks_own,
    term,
    with_terms_elsewhere,
)
from passes.verify.nodes.helper_nodes import helper
from passes.verify.nodes.kv_heads import repeated, repeated_in_attention
from passes.verify.nodes.literals import check_literals
from passes.verify.nodes.same_op import FURTHER_CHECKS, check_same_op

# Kind -> the slot of a bias that, where ranks owe a sum, one of them adds alone.
_BIAS = {"linear": 2, "conv": 2, "experts": 6}
# Position of the layer's index among the arguments of a Cache's methods.
_LAYER_ARGUMENT = {"update": 3, "get_seq_length": 1, "get_mask_sizes": 2}


def interpret(program: RankProgram, tools: Tools) -> RankFacts:
    """Interprets a program and returns what concerns its group. Senders must be interpreted before receivers. Raises
    VerificationError at the first node that is wrong."""
    state = RankState(program, tools)
    for node in program.graph_module.graph.nodes:
        try:
            _visit(state, node)
        except VerificationError:
            raise
        except Exception as error:  # arguments of a form that no pass writes
            fail(program, node, f"its arguments make no sense ({type(error).__name__}: {error})", untouched=Duty.SIZES)
    return state.facts


def _visit(state: RankState, node: Node) -> None:
    if node.op == "placeholder":
        _input(state, node)
    elif node.op == "get_attr":
        _attribute(state, node)
    elif node.op == "output":
        _output(state, node)
    elif node.op == "call_function" and node.target in EXCHANGES:
        EXCHANGES[node.target](state, node)
    elif _is_element(state, node):
        pieces: Any = state.values[node.args[0]]
        if not -len(pieces) <= node.args[1] < len(pieces):
            fail(state.program, node, f"takes element {node.args[1]} of {len(pieces)}", untouched=Duty.SIZES)
        state.set(node, pieces[node.args[1]])
    else:
        op = state.graph.ops.get(node.name)
        mine = op is not None and op.kind not in SOURCES
        if (op is not None and mine and op.kind.startswith("scalar.")) or not _makes_tensors(node):
            _number(state, node)
        elif op is not None and mine and state.program.stage in state.plan.op(op.name).stages:
            _op(state, node, op)
        else:
            helper(state, node)


def _makes_tensors(node: Node) -> bool:
    value = node_meta.val(node)
    return isinstance(value, torch.Tensor) or (
        isinstance(value, (tuple, list)) and any(isinstance(v, torch.Tensor) for v in value)
    )


def _is_element(state: RankState, node: Node) -> bool:
    return (
        op_name(node) == "getitem"
        and isinstance(node.args[0], Node)
        and type(state.values.get(node.args[0])) is tuple
        and type(node.args[1]) is int
    )


def _input(state: RankState, node: Node) -> None:
    if node.name not in state.graph.ops or state.graph[node.name].kind != "input":
        fail(state.program, node, "is no input of the model", untouched=Duty.MESSAGES)
    if node_meta.is_tensor(node):
        state.set(node, Value(TensorRef(node.name), WHOLE))
    else:
        state.known[node] = node_meta.val(node)


def _attribute(state: RankState, node: Node) -> None:
    shard = state.program.param_shards.get(str(node.target))
    if shard is not None:
        state.set(node, state.shard_value(shard))
        return
    tensor = fetch(state.module, str(node.target))
    if not isinstance(tensor, torch.Tensor) or not node_meta.is_constant(node):
        fail(state.program, node, "reads something that is no parameter or buffer of the model", untouched=Duty.WEIGHTS)
    state.known[node] = Tensor((tuple(tensor.shape), tensor.dtype))


def _output(state: RankState, node: Node) -> None:
    if not isinstance(node.args[0], dict):
        fail(state.program, node, "does not return the model's outputs by name", untouched=Duty.MESSAGES)
    for name, value in node.args[0].items():
        found: list[Node] = []
        torch.fx.node.map_arg(value, found.append)
        for position, tensor in enumerate(n for n in found if n in state.values):
            own = state.value(node, tensor)
            if own.held != WHOLE:
                fail(
                    state.program, node,
                    f"output {name} is {tensor.name}, which is {own.held} here; every rank of the last stage must "
                    f"have the whole",
                    missing=Duty.COLLECTIVES,
                )  # fmt: skip
            state.facts.outputs[name if len(found) == 1 else f"{name}[{position}]"] = own.ref


def _number(state: RankState, node: Node) -> None:
    known = node_meta.has_val(node)
    if node.op == "call_method" and str(node.target) in _LAYER_ARGUMENT and not node_meta.is_tensor(node.args[0]):
        _cache_question(state, node)
        return
    if any(not isinstance(a, Node) or a not in state.known for a in node.all_input_nodes):
        fail(state.program, node, "takes a value that is not known", inputs=True)
    sharded = [a for a in tensor_arguments(node) if isinstance(state.values.get(a), Value)]
    sharded = [a for a in sharded if not state.has_whole(state.value(node, a).held)]
    if sharded and node.target not in (torch.ops.aten.sym_size.int, getattr):
        fail(
            state.program, node,
            f"reads numbers from {sharded[0].name}, which is {state.value(node, sharded[0]).held}",
            missing=Duty.COLLECTIVES,
        )  # fmt: skip
    if known and any(_is_object(state.known[a]) for a in node.all_input_nodes):
        found = node_meta.val(node)  # of a cache: what it says depends on what was put in
    else:
        try:
            found = state.tools.runner.run(state.program, node, state.known)
        except Exception as error:
            fail(state.program, node, f"cannot be computed: {error}")
    theirs = node_meta.val(node)
    if known and not _same_number(found, theirs):
        fail(
            state.program, node, f"is {found} at the example sizes, where the model has {theirs}",
            untouched=Duty.SIZES,
        )  # fmt: skip
    state.known[node] = found


def _cache_question(state: RankState, node: Node) -> None:
    layer = argument(node, _LAYER_ARGUMENT[str(node.target)], "layer_idx", 0)
    layers = len(state.program.cache_layers) + len(state.program.length_kinds)
    if type(layer) is not int or not 0 <= layer < layers:
        fail(
            state.program, node,
            f"asks for cache layer {layer}, and this rank's cache has layers 0 to {layers - 1}",
            untouched=Duty.CACHE,
        )  # fmt: skip
    state.known[node] = node_meta.val(node)


def _op(state: RankState, node: Node, op: Op) -> None:
    check_owner(state, node, op)
    if is_joined(node) and op.kind == "join_rows":
        joined(state, node, op)
        return
    given = _given(state, node, op)
    has_bias = op.kind in _BIAS and len(op.inputs) == _BIAS[op.kind] + 1
    lacks_bias = has_bias and len(given) == _BIAS[op.kind]
    if len(given) != len(op.inputs) and not lacks_bias:
        fail(
            state.program, node, f"takes {len(given)} tensors where the model's op takes {len(op.inputs)}",
            untouched=Duty.WEIGHTS,
        )  # fmt: skip
    types = _types(state, node, op, given)
    check_same_op(state, node, op, types)
    check_literals(state, node, op, types)
    expected = state.planned(op)
    if op.kind == "repeat_interleave" and (types[0] != WHOLE or expected[0] != WHOLE):
        done = repeated(state, node, op, types[0], expected[0])
    elif is_term(state, op):
        term(state, node, op, types)
        done = Derivation(expected)
    elif picks_own(state, op, types):
        done = Derivation(expected)  # check_same_op: it is this rank's
    elif op.kind == "cache_read":
        done = Derivation(expected)  # verify_handover: so it was written
    else:
        done = derived(state, node, op, types, expected)
    if has_bias and PARTIAL in done.outputs and not _goes_along(done, _BIAS[op.kind]):
        state.facts.biases[op.name] = (node, not lacks_bias)
    elif lacks_bias:
        fail(
            state.program, node, f"adds no bias ({op.inputs[-1].op}), and owes no sum that has it",
            untouched=Duty.WEIGHTS,
        )  # fmt: skip
    if done.factor is not None and PARTIAL in done.outputs:
        state.facts.sums[op.name] = (node, done.factor.size, done.part)
    check = FURTHER_CHECKS.get(op.kind)
    if check is not None:
        check(state, node, op, types, done)
    _finish(state, node, op, done.outputs)


def _goes_along(done: Derivation, slot: int) -> bool:
    """Returns whether an input is cut along what the op sums over: each rank then has a part of it for its term."""
    return done.factor is not None and any(link.slot == slot for link in done.factor.inputs)


def _given(state: RankState, node: Node, op: Op) -> list[Value]:
    """Returns the tensors that the node takes, in the order of the op's inputs; a module's own come last."""
    given = []
    for a in node.all_input_nodes:
        values = state.values.get(a)
        if values is not None and not isinstance(values, Value) and any(v.held != WHOLE for v in values):
            fail(state.program, node, f"takes all of {a.name} at once, which is sharded", missing=Duty.COLLECTIVES)
    for a in tensor_arguments(node):
        if not node_meta.is_constant(a) and a.target is not log_sum_exp:  # same_op.py looks at that
            given.append(state.value(node, a))
    if node.op == "call_module":
        target = str(node.target)
        module = submodule(state.module, target)
        names = ["weight", "bias"] if op.kind in ("linear", "embedding", "layer_norm") else (
            [*module._parameters, *module._buffers]
        )  # fmt: skip
        for name in names:
            if getattr(module, name, None) is None:
                continue
            shard = state.program.param_shards.get(f"{target}.{name}")
            if shard is None:
                fail(state.program, node, f"nothing says where {target}.{name} comes from", untouched=Duty.WEIGHTS)
            given.append(state.shard_value(shard))
    return given


def _types(state: RankState, node: Node, op: Op, given: list[Value]) -> tuple[Held, ...]:
    """Returns how the inputs lie, after making sure that they are the tensors that the model's op reads."""
    types = []
    for slot, value in enumerate(given):
        if value.ref == op.inputs[slot] or (value.held.partial and passed_over(state, value.ref, op.inputs[slot])):
            types.append(value.held)
        elif op.kind == "sdpa" and slot in (1, 2):
            types.append(repeated_in_attention(state, node, op, slot, value, given[0]))
        else:
            fail(
                state.program, node,
                f"input {slot} is {named(value.ref)} where the model's op reads {named(op.inputs[slot])}", inputs=True,
            )  # fmt: skip
    return tuple(types)


def _finish(state: RankState, node: Node, op: Op, outputs: tuple[Held, ...]) -> None:
    """Notes what came out, after making sure that the node's own arguments give these local shapes."""
    values = tuple(Value(TensorRef(op.name, j), h) for j, h in enumerate(outputs))
    if node_meta.is_tensor(node):
        expected: Any = state.local(values[0])
    else:
        expected = tuple(part_elsewhere(state, op, v) or state.local(v) for v in values)
    if op.kind not in ("cache_update", "cache_read"):  # gives back what it is given, and what was there
        check_shape(state, node, expected)
    if not node_meta.is_tensor(node):
        state.set_all(node, values)
    elif is_term(state, op):
        state.set(node, Value(with_terms_elsewhere(state, values[0].ref), PARTIAL))
    else:
        state.set(node, values[0])


_PLAIN = (int, float, bool, str, torch.dtype, torch.device)


def _is_object(value: Any) -> bool:
    return value is not None and not isinstance(value, (*_PLAIN, tuple, list))


def _same_number(a: Any, b: Any) -> bool:
    """Returns whether two sizes, dtypes, devices, or tuples of such are the same. What cannot be compared counts as
    equal."""
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same_number(x, y) for x, y in zip(a, b, strict=True))
    return a == b if isinstance(a, _PLAIN) and isinstance(b, _PLAIN) else True
