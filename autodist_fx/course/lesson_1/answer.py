"""Lesson 1: two ranks, one model. Write the pass that makes them talk.

A stage's graph names what it needs of an earlier rank, and computes what a later rank needs. Nothing is sent yet. Fill
in the two holes, then run

    autodist-fx course check 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from passes.ops.comm import recv, send  # what the compiler's own graphs call


@dataclass(frozen=True)
class Hop:
    """A tensor that crosses from rank `source` to rank `target`.

    value: the name of the node that computes it on `source`, and of the placeholder that stands for it on `target`.
    channel: a number that the send and its recv share, so that two messages cannot be mixed up.
    shape, dtype: what the receiver has to know before anything arrives.
    """

    value: str
    source: int
    target: int
    channel: int
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float64


def node_called(stage: GraphModule, name: str) -> Node:
    """Return the node of this name in a stage's graph."""
    return next(node for node in stage.graph.nodes if node.name == name)


def insert_send(stage: GraphModule, hop: Hop) -> None:
    """Insert `send(value, hop.target, hop.channel)` right behind the node that computes the hop's value.

    You need stage.graph.inserting_after(node) and stage.graph.call_function(function, arguments).
    """
    # hole
    value = node_called(stage, hop.value)
    with stage.graph.inserting_after(value):
        stage.graph.call_function(send, (value, hop.target, hop.channel))
    # end


def insert_recv(stage: GraphModule, hop: Hop) -> None:
    """Replace the placeholder of the hop's value by `recv(shape, dtype, device, source, channel)`; device is "cpu".

    All that read the placeholder read what recv returns. It is received once, however many they are. You need
    node.replace_all_uses_with(other) and stage.graph.erase_node(node).
    """
    # hole
    placeholder = node_called(stage, hop.value)
    with stage.graph.inserting_after(placeholder):
        received = stage.graph.call_function(recv, (hop.shape, hop.dtype, "cpu", hop.source, hop.channel))
    placeholder.replace_all_uses_with(received)
    stage.graph.erase_node(placeholder)
    # end


def insert_send_recv(stage: GraphModule, rank: int, hops: Sequence[Hop]) -> None:
    """The pass: rewrite the graph of one rank, in place, by all hops that begin or end there."""
    for hop in hops:
        if hop.source == rank:
            insert_send(stage, hop)
        if hop.target == rank:
            insert_recv(stage, hop)
    stage.graph.lint()
    stage.recompile()
