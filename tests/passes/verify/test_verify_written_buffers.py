"""A rank that writes something else, or elsewhere, than the model does is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch.fx import Node

import autodist_fx as adx
from cost_model.errors import VerificationError
from passes.ops.buffers import write_buffers
from passes.verify.verify import verify
from tests.support.models import tiny_config


def other_buffer(node: Node) -> None:
    values, (first, second) = node.args  # type: ignore[misc]
    node.args = (values, [first, first])


def other_value(node: Node) -> None:
    (first, _), buffers = node.args  # type: ignore[misc]
    node.args = ([first, buffers[1]], buffers)


def only_one(node: Node) -> None:
    values, buffers = node.args  # type: ignore[misc]
    node.args = (values[:1], buffers[:1])


def nothing(node: Node) -> None:
    values: Any = node.args[0]
    for user in list(node.users):
        user.replace_all_uses_with(values[user.args[1]])
        node.graph.erase_node(user)
    node.graph.erase_node(node)


@pytest.mark.parametrize("breaking", [other_buffer, other_value, only_one, nothing])
def test_written_buffers_are_verified(breaking: Callable[[Node], None]) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0}
    compiled = adx.compile(tiny_config("llama", rope_scaling=rope), tp=2, verify=False)
    programs = compiled.all_programs(compiled.variants[0])
    verify(programs, compiled.plan, compiled.op_graph, compiled.graph)
    module = programs[1].graph_module
    breaking(next(node for node in module.graph.nodes if node.target is write_buffers))
    with pytest.raises(VerificationError):
        verify(programs, compiled.plan, compiled.op_graph, compiled.graph)
