"""Arguments of nodes, and attributes of modules by dotted path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch.fx import Node
from torch.fx.node import map_arg

from passes.fx import node_meta


def tensor_arguments(node: Node) -> list[Node]:
    """Returns every tensor-valued argument of a node, in the order of `Op.inputs`; one used twice stands twice."""
    found: list[Node] = []

    def visit(n: Node) -> Node:
        if node_meta.is_tensor(n):
            found.append(n)
        return n

    map_arg((node.args, node.kwargs), visit)
    return found


def map_tensor_arguments(node: Node, change: Callable[[int, Node], Node]) -> None:
    """Replaces the i-th tensor argument by change(i, argument)."""
    slot = -1

    def visit(n: Node) -> Node:
        nonlocal slot
        if not node_meta.is_tensor(n):
            return n
        slot += 1
        return change(slot, n)

    args, kwargs = map_arg((node.args, node.kwargs), visit)
    node.args, node.kwargs = args, kwargs


def tensor_source(node: Node) -> tuple[str, int]:
    """Returns (op name, output index) of the tensor that a node stands for. getitem on a tuple is no op of its own, and
    the last term that a rank adds to a sum stands for the whole sum (own_experts)."""
    instead = node_meta.stands_for(node)
    if instead is not None:
        return instead, 0
    if node.op == "call_function" and node.target.__name__ == "getitem" and isinstance(node.args[1], int):
        source = node.args[0]
        if isinstance(node_meta.val(source), (tuple, list)):
            return source.name, node.args[1] % len(node_meta.val(source))
    return node.name, 0


def fetch(module: torch.nn.Module, target: str) -> Any:
    """Returns the attribute at a dotted path."""
    for atom in target.split("."):
        module = getattr(module, atom)
    return module


def submodule(root: torch.nn.Module, target: str) -> torch.nn.Module:
    """Returns the module at a dotted path, as `root.get_submodule(target)`, which checks each name twice and is slower.

    Raises KeyError.
    """
    module: torch.nn.Module = root
    for atom in target.split("."):
        module = module._modules[atom]
    return module


def place(module: torch.nn.Module, target: str, value: Any) -> None:
    """Sets the attribute at a dotted path, making plain modules on the way."""
    *path, name = target.split(".")
    for atom in path:
        if not hasattr(module, atom):
            module.add_module(atom, torch.nn.Module())
        module = getattr(module, atom)
    if isinstance(value, torch.nn.Module):
        module.add_module(name, value)
    elif isinstance(value, torch.nn.Parameter):
        module.register_parameter(name, value)
    else:
        setattr(module, name, value)


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """Returns an argument given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
