"""Decides `if`s, sizes and `max` of traced values, as far as can be said without knowing the data.

fx has one graph for all inputs, so that a condition must come out the same for all. These do, and are common:

- values that no input's data go into (`torch.arange(n)[0] > 0`) are computed, with the example's lengths;
- comparisons of lengths, also of tensors that hold one, are decided for the example's, and asked again at each call
  (passes/normalize/extract_guards.py);
- what is asserted is taken for true, and what only an error or a warning follows (`if ...: raise`) for false: the
  graph makes no check of its inputs;
- in a module without parameters both branches are traced (value_branches.py);
- values that follow from the masks' being zeros and ones: no token is attended to globally (ranges.py);
- conditions on the integers that a call is given, where the graph is made for that call (value_guards.py);
- "does this have any padding?", asked to skip work where not: `torch.all(mask == 1)` is taken for false and
  `(ids == pad).any()` for true, since masking nothing changes nothing. transformers' masking utilities are patched in
  the same sense.
"""

from __future__ import annotations

import dis
import operator
import sys
import types
from typing import Any

import torch
from torch.fx import Node, Proxy
from torch.fx.node import map_aggregate, map_arg

from autodist_fx.calls.value_guards import known_value
from autodist_fx.tracing.control_flow.raise_branches import answer_without_error
from autodist_fx.tracing.control_flow.random_calls import NAMES
from autodist_fx.tracing.control_flow.value_ranges import certain
from autodist_fx.tracing.versions.tracer_base import DeviceAttribute, SymbolicProxy
from passes.fx import node_meta


def decide(proxy: SymbolicProxy) -> bool:
    """Return what `bool(proxy)` is for every input. Raises TypeError where that depends on the data."""
    known = getattr(proxy, "_metadata", None)
    frame = sys._getframe(1)
    asserted = _is_asserted(frame)
    without_error = None if asserted else answer_without_error(frame)
    if without_error is not None:
        return without_error
    if known is None and not asserted:
        return Proxy.__bool__(proxy)
    if not isinstance(known, torch.Tensor):
        return asserted or _of_lengths(proxy, frame)
    padded = _asks_for_padding(proxy.node)
    if padded is not None:
        return padded
    if asserted:
        return True
    sure = certain(proxy.node, proxy.tracer)
    if sure is not None:
        return sure
    if proxy.tracer.answers is not None and known.numel() == 1:
        return bool(proxy.tracer.answers.answer(proxy))
    compared = _compared_lengths(proxy.node, proxy.tracer)
    if compared is not None:
        return _of_lengths(compared, frame)
    answers = set()
    try:
        for position in (1, _FAR) if proxy.tracer.phase == "step" else (0,):
            answers.add(bool(_computed(proxy.node, proxy.tracer, position, {})))
    except _DependsOnDataError as error:
        value = known_value(proxy)
        if value is None:
            raise TypeError(f"a condition depends on the values of {error}") from None
        return bool(value)
    if len(answers) > 1:
        raise TypeError("a condition depends on how many tokens came before")
    return answers.pop()


_FAR = 2**30
_COMPARISONS = ("gt", "ge", "lt", "le", "eq", "ne")


def _of_lengths(proxy: SymbolicProxy, frame: types.FrameType) -> bool:
    """Decide a comparison of sizes as it is for the example's; another call may need it otherwise, so that what the
    model's own code asks is kept. What transformers' common code asks (is one token enough to be causal?) comes to
    the same."""
    known = bool(proxy._metadata)
    if frame.f_code.co_filename in proxy.tracer.source_files:
        node_meta.set_guard_outcome(proxy.node, known)
    return known


def _compared_lengths(node: Node, tracer: Any) -> Any:
    """Return a comparison of 0-dim tensors that hold sizes, or the truth of one, as that of the sizes themselves;
    None for any other node, and where there are positions in a cache: a model may ask whether anything is in it yet."""
    if any(n.op == "placeholder" and n.target == "cache_position" for n in tracer.graph.nodes):
        return None
    name = getattr(node.target, "__name__", node.target)
    name, args = (name, node.args) if name in _COMPARISONS and len(node.args) == 2 else ("ne", (node, 0))
    parts = [_length_of(a, tracer) if isinstance(a, Node) else a for a in args]
    known = all(type(p) in (int, float) or isinstance(p, Proxy) for p in parts)
    return getattr(operator, str(name))(*parts) if known and any(isinstance(p, Proxy) for p in parts) else None


def _is_asserted(frame: types.FrameType) -> bool:
    """Return whether the frame stands at `assert condition`: at the jump over the raising of an AssertionError."""
    instructions = iter(dis.get_instructions(frame.f_code))
    if not any(instruction.offset == frame.f_lasti for instruction in instructions):
        return False
    following = next((i for i in instructions if i.opname != "CACHE"), None)
    return following is not None and following.opname == "LOAD_ASSERTION_ERROR"


class _DependsOnDataError(Exception):
    pass


def lengths_for_tensors(value: Any) -> Any:
    """Return `value`, an argument of torch.full or of rotary embeddings, with sizes in place of 0-dim tensors that hold
    one.

    Models write `cache_position[-1] + 1` for the number of tokens; it is a number only once there is data, while the
    end of the range that the positions were made from is one now.
    """
    return map_aggregate(value, lambda v: _as_length(v) if isinstance(v, Proxy) else _as_number(v))


def _as_number(value: Any) -> Any:
    """Return the integer that a 0-dim constant of the graph holds; anything else as it is."""
    known = isinstance(value, torch.Tensor) and not value.is_meta and value.dim() == 0
    return int(value) if known and not value.is_floating_point() and value.dtype != torch.bool else value


def _as_length(proxy: Proxy) -> Any:
    known = getattr(proxy, "_metadata", None)
    if not isinstance(known, torch.Tensor) or known.dim() or known.is_floating_point():
        return proxy
    found = _length_of(proxy.node, proxy.tracer)
    if found is None and type(number := known_value(proxy)) is int:
        return number
    return proxy if found is None else found


def _length_of(node: Node, tracer: Any) -> Any:
    """Return a number (or a proxy of one) that is always what the node holds; None where there is none to be found."""
    name = getattr(node.target, "__name__", node.target)
    if type(tracer.examples_of.get(node)) is int:
        return _number(node, tracer)
    if name in ("add", "sub", "mul") and len(node.args) == 2:
        parts = [_length_of(a, tracer) if isinstance(a, Node) else a for a in node.args]
        known = all(type(p) is int or isinstance(p, Proxy) for p in parts)
        return getattr(operator, str(name))(*parts) if known else None
    if name == "tensor" and len(node.args) == 1:
        return _number(node.args[0], tracer)
    if name != "getitem" or node.args[1] not in (0, -1) or not isinstance(node.args[0], Node):
        return None
    positions, first = node.args[0], node.args[1] == 0
    if positions.op == "placeholder" and positions.target == "cache_position":
        return None if first else _tokens_so_far(tracer)
    if getattr(positions.target, "__name__", "") != "arange":
        return None
    bounds = [_number(a, tracer) for a in positions.args]
    if len(bounds) not in (1, 2):
        return None
    return [0, *bounds][-2] if first else bounds[-1] - 1


def _tokens_so_far(tracer: Any) -> Any:
    """Return the position of the last token: the mask has one column for each token up to it."""
    inputs = {node.target: node for node in tracer.graph.nodes if node.op == "placeholder"}
    node = inputs.get("decoder_attention_mask" if "decoder_input_ids" in inputs else "attention_mask")
    if node is None:
        return None
    mask = tracer.proxy(node)
    mask.install_metadata(tracer.examples_of[node])
    return mask.shape[-1] - 1


def _number(value: Any, tracer: Any) -> Any:
    """Return a proxy of a node, with its example; a number as it is."""
    if not isinstance(value, Node):
        return value
    proxy = tracer.proxy(value)
    proxy.install_metadata(tracer.examples_of[value])
    return proxy


def longest(function: Any) -> Any:
    """Make a `max` or `min` that can be traced: which of two sizes is larger may differ from call to call."""

    def compared(*args: Any, **kwargs: Any) -> Any:
        tracer = next((a.tracer for a in args if isinstance(a, Proxy)), None)
        return function(*args, **kwargs) if tracer is None else tracer.create_proxy("call_function", function, args, {})

    return compared


def is_instance(value: Any, classes: Any) -> bool:
    """Return what `isinstance` does, where a traced tensor is a tensor: `mask.shape[-1] if isinstance(mask,
    torch.Tensor) else ...`."""
    known = getattr(value, "_metadata", None) if isinstance(value, Proxy) else None
    return isinstance(value, classes) or (isinstance(known, torch.Tensor) and isinstance(known, classes))


def _asks_for_padding(node: Node) -> bool | None:
    """Return the answer to all(x == 1) and to any(x == number), where x is an input of the model or a part of one;
    None for other nodes."""
    name = getattr(node.target, "__name__", node.target)
    if name not in ("all", "any") or len(node.args) != 1:
        return None
    compared = node.args[0]
    if not isinstance(compared, Node) or compared.target not in (operator.eq, torch.eq, "eq", "__eq__"):
        return None
    given, number = compared.args
    while isinstance(given, Node) and given.op != "placeholder" and given.target is operator.getitem:
        given = given.args[0]
    if not isinstance(given, Node) or given.op != "placeholder" or not isinstance(number, int):
        return None
    return True if name == "any" else False if number == 1 else None


def _computed(node: Node, tracer: Any, position: int, done: dict[Node, Any]) -> Any:
    """Compute the node's value, on the CPU, made of numbers and sizes alone; cache positions start at `position`."""
    if node in done:
        return done[node]
    known = tracer.examples_of.get(node)
    if known is not None and not _has_tensors(known):
        value = torch.device("cpu") if isinstance(known, (torch.device, DeviceAttribute)) else known
    elif tracer.phase and node.op == "placeholder" and node.target == "cache_position":
        value = position + torch.arange(known.shape[0])
    elif node.op not in ("call_function", "call_method"):
        raise _DependsOnDataError(node.name)
    elif getattr(node.target, "__name__", node.target) in NAMES:
        raise _DependsOnDataError(f"{node.name}, a random number: set its probability (layerdrop, say) to 0")
    else:
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: _computed(n, tracer, position, done))
        kwargs = {k: torch.device("cpu") if k == "device" else v for k, v in kwargs.items()}
        if node.op == "call_method":
            value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            value = node.target(*args, **kwargs)
    done[node] = value
    return value


def _has_tensors(value: Any) -> bool:
    found = []
    map_aggregate(value, lambda v: found.append(v) if isinstance(v, torch.Tensor) else None)
    return bool(found) or isinstance(value, Proxy)
