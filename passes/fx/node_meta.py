"""The keys of `node.meta` and `graph_module.meta`: who writes each, in which phases it is valid, and typed access.

A pass tells the passes after it what it found on the nodes themselves. All of that is declared here (`NODE_KEYS`,
`GRAPH_KEYS`) and read and written through the functions below, so that a key that nobody declared, that is still there
when its phase is over, or that is missing is an error right behind the pass that is to blame (`check`).

    Phase        the graph is                                                  made by
    TRACED       as the model's code was recorded                              a front end (autodist_fx/tracing)
    ANNOTATED    the same, with the shapes of all values; being normalised     passes/fx/shape_propagation.py
    NORMALIZED   the whole model's, in one spelling: plans are made for it     passes/normalize/pipeline.py
    PARTITIONED  one rank's part of it; being rewritten                        passes/partition/extract_stage.py
    EMITTED      one rank's program: verified, saved, run                      passes/partition/pipeline.py
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from torch.fx import Node

from cost_model.plan.data import Hop, OpPlan

if TYPE_CHECKING:
    from passes.fx.guards import Guards


class Phase(enum.IntEnum):
    """How far a graph has come (see the module's docstring)."""

    TRACED = 0
    ANNOTATED = 1
    NORMALIZED = 2
    PARTITIONED = 3
    EMITTED = 4


@dataclass(frozen=True, slots=True)
class Stamp:
    """The passes that a node is the work of, by their files within passes/: "partition/insert_collectives"."""

    made_by: str  # made the node, or was the last to change its target or a number in its arguments; "" a front end
    wired_by: str  # was the last to change which nodes it reads


@dataclass(frozen=True, slots=True)
class PassRecord:
    """The result of one run of a pass: places it worked on, nodes that it inserted and removed."""

    name: str
    matches: int
    inserted: int
    removed: int


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a meta dict: valid in the phases from `first` to `last`."""

    name: str
    first: Phase
    last: Phase
    writer: str
    meaning: str


NODE_KEYS = (
    Key("source", Phase.TRACED, Phase.EMITTED, "the front end", "str: the model's line, 'modeling_llama.py:241'"),
    Key("nn_module_stack", Phase.TRACED, Phase.EMITTED, "torch.fx's tracer", "the modules that were being called"),
    Key("is_wrapped", Phase.TRACED, Phase.EMITTED, "torch.fx.wrap", "True: calls a function that fx leaves whole"),
    Key("stamp", Phase.TRACED, Phase.EMITTED, "run_passes", "Stamp: the passes that made the node and last rewired it"),
    Key("is_tensor", Phase.TRACED, Phase.TRACED, "the front end, functionalize", "bool: whether the value is a tensor"),
    Key("guard", Phase.TRACED, Phase.ANNOTATED, "the front end; extract_guards removes it",
        "bool: how an `if` on sizes came out while tracing"),
    Key("val", Phase.ANNOTATED, Phase.EMITTED, "shape_propagation, then whoever makes a node",
        "meta tensor, number, or tuple of them at the first example's sizes; shapes are the whole tensor's"),
    Key("symbols", Phase.ANNOTATED, Phase.EMITTED, "shape_propagation, then whoever makes a node",
        "size symbols: of a tensor one a dim ('' where constant), of a tuple one such tuple a tensor, of an int a str"),
    Key("stands_for", Phase.PARTITIONED, Phase.EMITTED, "extract_stage",
        "str: the op whose result a rank's last term of a sum takes the place of (own_experts)"),
    Key("constant", Phase.PARTITIONED, Phase.EMITTED, "localize_shapes", "True: reads a constant that a pass made"),
    Key("hop", Phase.PARTITIONED, Phase.PARTITIONED, "extract_stage, insert_send_recv",
        "Hop: the transfer between stages that a placeholder, recv or send is of"),
    Key("reads_for", Phase.PARTITIONED, Phase.PARTITIONED, "localize_shapes",
        "(OpPlan, input slot): the op before whose input this node picks elements"),
)  # fmt: skip
GRAPH_KEYS = (
    Key("guards", Phase.ANNOTATED, Phase.NORMALIZED, "extract_guards", "Guards | None: the graph's guards on sizes"),
    Key("history", Phase.NORMALIZED, Phase.EMITTED, "the pipelines", "tuple of PassRecord: the passes that ran"),
)


class MetaError(AssertionError):
    """A pass left a node with a key that it must not have, or without one that it must have: a bug in that pass."""


def _allowed(keys: tuple[Key, ...]) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(k.name for k in keys if k.first <= phase <= k.last) for phase in Phase)


_NODE_ALLOWED, _GRAPH_ALLOWED = _allowed(NODE_KEYS), _allowed(GRAPH_KEYS)


def check(graph_module: torch.fx.GraphModule, phase: Phase) -> None:
    """Raises MetaError for a key that is unknown or not of `phase`, and for a value without `val` that is a tensor.

    Linear in the nodes: it is called after each pass.
    """
    allowed, annotated = _NODE_ALLOWED[phase], phase >= Phase.ANNOTATED
    for node in graph_module.graph.nodes:
        meta = node.meta
        if not allowed.issuperset(meta):
            _refuse(f"node {node.name}", meta, NODE_KEYS, phase)
        if annotated and "val" not in meta and _needs_val(node):
            raise MetaError(
                f"node {node.name} ({node.op} {node.target}) has no 'val': whoever makes a node that gives a tensor "
                "says which (node_meta.set_val, node_meta.copy)"
            )
    if not _GRAPH_ALLOWED[phase].issuperset(graph_module.meta):
        _refuse("the graph", graph_module.meta, GRAPH_KEYS, phase)


def _refuse(owner: str, meta: Mapping[str, Any], keys: tuple[Key, ...], phase: Phase) -> None:
    known = {key.name: key for key in keys}
    for name in meta:
        key = known.get(name)
        if key is None:
            raise MetaError(f"{owner} has an unknown key {name!r}: declare it in passes/fx/node_meta.py")
        if not key.first <= phase <= key.last:
            raise MetaError(
                f"{owner} has the key {name!r} in the phase {phase.name}; it is valid from {key.first.name} to "
                f"{key.last.name} (written by {key.writer})"
            )


def _needs_val(node: Node) -> bool:
    """Returns whether a node without `val` may give a tensor: all but the output and what Python computes from numbers.
    """
    if node.op in ("output", "placeholder"):
        return node.op == "placeholder"
    if node.op != "call_function":
        return True
    if node.target is getattr:
        return False  # a device, a dtype
    of_numbers = getattr(node.target, "__module__", "") in ("_operator", "builtins", "math")
    return not of_numbers or any(is_tensor(a) for a in node.all_input_nodes)


def drop_ended(graph_module: torch.fx.GraphModule, phase: Phase) -> None:
    """Removes the nodes' keys that are over when the graph comes into `phase`."""
    ended = [key.name for key in NODE_KEYS if key.last < phase]
    for node in graph_module.graph.nodes:
        for name in ended:
            node.meta.pop(name, None)


def copy(source: Node, target: Node, *, only: Collection[str] | None = None, without: Collection[str] = ()) -> None:
    """Gives `target` all keys of `source`, or those in `only`, but for `without`; keys of its own are lost."""
    target.meta = {k: v for k, v in source.meta.items() if k not in without and (only is None or k in only)}


# -- values and shapes -------------------------------------------------------------------------------------------------


def everything(node: Node) -> dict[str, Any]:
    """Returns every key that the node has, and its value: for a copy of a whole graph."""
    return dict(node.meta)


def set_everything(node: Node, found: Mapping[str, Any]) -> None:
    """Sets what `everything` gave of another node."""
    node.meta.clear()
    node.meta.update(found)


def val(node: Node) -> Any:
    """Returns the node's value at the first example: a meta tensor, a number, or a tuple; None where nobody has said.
    """
    return node.meta.get("val")


def set_val(node: Node, value: Any) -> None:
    """Sets the node's value at the first example."""
    node.meta["val"] = value


def has_val(node: Node) -> bool:
    """Returns whether anybody has said what the node gives, None included."""
    return "val" in node.meta


def is_tensor(node: Node) -> bool:
    """Returns whether the node is known to give a tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def tensor(node: Node) -> torch.Tensor:
    """Returns the node's value at the first example, a meta tensor. Raises MetaError where it gives none."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise MetaError(f"node {node.name} gives no tensor ({type(value).__name__})")
    return value


def symbols(node: Node) -> tuple[str, ...]:
    """Returns the size symbol of each dim of a tensor ("" where constant); () where none are known."""
    return shape_symbols(node) or ()


def shape_symbols(node: Node) -> tuple[Any, ...] | None:
    """Returns the size symbols of a tensor or of a tuple of tensors, as they stand there; None where none are known."""
    found = node.meta.get("symbols")
    return found if isinstance(found, tuple) else None


def set_symbols(node: Node, value: tuple[str, ...] | tuple[tuple[str, ...] | None, ...] | str) -> None:
    """Sets the size symbols: of a tensor a tuple, of a tuple a tuple of such, of an int its symbol."""
    node.meta["symbols"] = value


def element_symbols(node: Node) -> tuple[tuple[str, ...] | None, ...]:
    """Returns the size symbols of each element of a node that gives a tuple: None for what is no tensor; () if not
    known."""
    return shape_symbols(node) or ()


def size_symbol(node: Node) -> str | None:
    """Returns the size symbol of a node that gives an int, "" for a constant; None where none is known."""
    found = node.meta.get("symbols")
    return found if isinstance(found, str) else None


# -- where a node comes from -------------------------------------------------------------------------------------------


def source(node: Node) -> str:
    """Returns the model's line that a node was recorded at, "modeling_llama.py:241"; "" where none is known."""
    return node.meta.get("source") or ""


def where(node: Node) -> str:
    """Returns `source` for a message: "no source line" where none is known."""
    return source(node) or "no source line"


def set_source(node: Node, line: str | None) -> None:
    """Sets the model's line."""
    node.meta["source"] = line


def module_stack(node: Node) -> Mapping[str, tuple[str, Any]]:
    """Returns the modules that were being called, outermost first: {key: (path, class)}, as torch.fx's tracer writes
    it."""
    return node.meta.get("nn_module_stack") or {}


def set_module_stack(node: Node, stack: Mapping[str, tuple[str, Any]]) -> None:
    """Sets the modules that were being called."""
    node.meta["nn_module_stack"] = stack


def module_path(node: Node) -> str:
    """Returns the path of the innermost module that was being called; "" at the root."""
    stack = module_stack(node)
    return next(reversed(stack.values()))[0] if stack else ""  # type: ignore[call-overload]


def made_by(node: Node) -> str:
    """Returns the pass that made the node or last changed its target or literals; "" where none has."""
    stamp: Stamp | None = node.meta.get("stamp")
    return stamp.made_by if stamp is not None else ""


def wired_by(node: Node) -> str:
    """Returns the pass that last changed which nodes it reads; "" where none has."""
    stamp: Stamp | None = node.meta.get("stamp")
    return stamp.wired_by if stamp is not None else ""


def set_stamp(node: Node, stamp: Stamp) -> None:
    """Sets the stamp of the passes that made and wired the node."""
    node.meta["stamp"] = stamp


def history(graph_module: torch.fx.GraphModule) -> tuple[PassRecord, ...]:
    """Returns the records of the passes that ran on this graph, in order; () of one that no pipeline has finished."""
    return graph_module.meta.get("history", ())


def set_history(graph_module: torch.fx.GraphModule, records: Collection[PassRecord]) -> None:
    """Sets the records of the passes that ran on this graph."""
    graph_module.meta["history"] = tuple(records)


# -- what the front end and normalize tell each other ------------------------------------------------------------------


def traced_as_tensor(node: Node, default: bool) -> bool:
    """Returns whether the value was a tensor while tracing; `default` where the front end did not say."""
    return bool(node.meta.get("is_tensor", default))


def set_traced_as_tensor(node: Node, value: bool) -> None:
    """Sets whether the value was a tensor while tracing."""
    node.meta["is_tensor"] = value


def is_guard(node: Node) -> bool:
    """Returns whether the model's code asked this node in an `if` on sizes."""
    return "guard" in node.meta


def guard_outcome(node: Node) -> bool:
    """Returns how that `if` came out while tracing."""
    return bool(node.meta["guard"])


def set_guard_outcome(node: Node, outcome: bool) -> None:
    """Marks the node as a guard that came out so while tracing."""
    node.meta["guard"] = outcome


def drop_guard(node: Node) -> None:
    """Removes the mark of a guard."""
    node.meta.pop("guard", None)


def is_normalized(graph_module: torch.fx.GraphModule) -> bool:
    """Returns whether normalize has done its work on this graph."""
    return "guards" in graph_module.meta


def guards(graph_module: torch.fx.GraphModule) -> Guards | None:
    """Returns the guards on sizes of a normalised graph; None where it has none, or is not normalised yet."""
    return graph_module.meta.get("guards")


def set_guards(graph_module: torch.fx.GraphModule, value: Guards | None) -> None:
    """Sets the guards; None where the graph has none. Marks it as normalised."""
    graph_module.meta["guards"] = value


# -- what the passes of one rank tell each other -----------------------------------------------------------------------


def stands_for(node: Node) -> str | None:
    """Returns the op whose result this node takes the place of on this rank; None for all other nodes."""
    return node.meta.get("stands_for")


def set_stands_for(node: Node, op: str) -> None:
    """Sets the op whose result this node takes the place of."""
    node.meta["stands_for"] = op


def is_constant(node: Node) -> bool:
    """Returns whether the node reads a constant that a pass made (which heads a rank's query heads read)."""
    return bool(node.meta.get("constant"))


def set_constant(node: Node) -> None:
    """Marks the node as reading a constant that a pass made."""
    node.meta["constant"] = True


def has_hop(node: Node) -> bool:
    """Returns whether the node is what a transfer between stages sends or receives."""
    return "hop" in node.meta


def hop(node: Node) -> Hop:
    """Returns the hop, a transfer between stages, that a placeholder, recv or send is of."""
    return node.meta["hop"]


def set_hop(node: Node, value: Hop) -> None:
    """Sets the hop that a placeholder, recv or send is of."""
    node.meta["hop"] = value


def has_reads_for(node: Node) -> bool:
    """Returns whether the node picks elements before an input of an op."""
    return "reads_for" in node.meta


def reads_for(node: Node) -> tuple[OpPlan, int]:
    """Returns (op, slot): the node picks elements before input `slot` of `op`."""
    return node.meta["reads_for"]


def set_reads_for(node: Node, op: OpPlan, slot: int) -> None:
    """Sets (op, slot): the node picks elements before input `slot` of `op`."""
    node.meta["reads_for"] = (op, slot)
