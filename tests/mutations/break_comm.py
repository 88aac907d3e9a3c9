"""Collectives and messages: lost, doubled, in another order, to the wrong rank, of the wrong tensor."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Node

from passes.fx import node_meta
from passes.ops.comm import COLLECTIVES, all_gather, all_reduce, recv, send
from passes.program.rank_program import RankProgram
from tests.mutations.mutation import NotHere, mutation, on_ranks, pick, pick_node, said
from tests.support.graphs.broken_programs import Programs, add_after, bypass, calls, with_argument, with_keyword


def _is(*targets: Any) -> Any:
    return lambda n: n.op == "call_function" and n.target in targets


@mutation
def collective_dropped(programs: Programs, rng: random.Random) -> str:
    places = on_ranks(programs, *pick_node(programs, rng, _is(*COLLECTIVES)), rng)
    for _program, node in places:
        bypass(node)
    return said(places)


@mutation
def collective_doubled(programs: Programs, rng: random.Random) -> str:
    """The second is of what the first gives, or nobody reads it."""
    places = on_ranks(programs, *pick_node(programs, rng, _is(*COLLECTIVES)), rng)
    of_result = rng.random() < 0.5
    for _program, node in places:
        again = add_after(node, node.target, (node, *node.args[1:]) if of_result else node.args, dict(node.kwargs))
        if of_result:
            node.replace_all_uses_with(again, delete_user_cb=lambda user, again=again: user is not again)
    return f"{said(places)}, {'of the result' if of_result else 'unread'}"


def _collectives(program: RankProgram) -> list[Node]:
    return calls(program, *COLLECTIVES)


@mutation
def collectives_reordered_on_one_rank(programs: Programs, rng: random.Random) -> str:
    """Two that do not depend on each other; where there are none, two more are made on every rank."""
    program = pick(rng, [p for p in programs if len(_collectives(p)) > 1])
    nodes = _collectives(program)
    place = {n: i for i, n in enumerate(program.graph_module.graph.nodes)}
    free = [(a, b) for a, b in pairwise(nodes) if all(place[x] < place[a] for x in b.all_input_nodes)]
    if free:
        a, b = rng.choice(free)
        a.prepend(b)
        return f"{b.name} before {a.name} on rank {program.rank}"
    at = rng.randrange(len(nodes) - 1)
    for other in programs:
        if other.stage == program.stage:
            a, b = _collectives(other)[at : at + 2]
            for node in (a, b) if other is program else (b, a):
                add_after(b, node.target, node.args, dict(node.kwargs))
    return f"two more after collective {at + 1}, in another order on rank {program.rank}"


@mutation
def another_collective(programs: Programs, rng: random.Random) -> str:
    """A gather in place of a sum, or the other way round."""
    program, node = pick_node(programs, rng, _is(*COLLECTIVES))
    places = on_ranks(programs, program, node, rng)
    for _program, n in places:
        if n.target is all_gather:
            n.target, n.kwargs = all_reduce, {"axis": "tp"}
        else:
            size, tp = node_meta.tensor(n).shape[-1], program.mesh.tp
            bounds = [size * i // tp for i in range(tp + 1)]
            parts = tuple(((a, b),) for a, b in pairwise(bounds))
            n.target, n.kwargs = all_gather, {"axis": "tp", "dim": node_meta.tensor(n).dim() - 1, "parts": parts}
    return said(places)


@mutation
def collective_along_another_axis(programs: Programs, rng: random.Random) -> str:
    places = on_ranks(programs, *pick_node(programs, rng, _is(*COLLECTIVES)), rng)
    for _program, node in places:
        with_keyword(node, axis="pp")
    return said(places)


@mutation
def gather_along_another_dim(programs: Programs, rng: random.Random) -> str:
    program, node = pick_node(programs, rng, _is(all_gather))
    dims = [d for d in range(node_meta.tensor(node).dim()) if d != node.kwargs["dim"]]
    places, dim = on_ranks(programs, program, node, rng), pick(rng, dims)
    for _program, n in places:
        with_keyword(n, dim=dim)
    return f"{said(places)}, dim {dim}"


@mutation
def parts_of_a_gather_permuted(programs: Programs, rng: random.Random) -> str:
    program, node = pick_node(programs, rng, _is(all_gather))
    parts = node.kwargs["parts"]
    turned = (*parts[1:], parts[0])
    places = on_ranks(programs, program, node, rng)
    for _program, n in places:
        with_keyword(n, parts=turned)
    return said(places)


@mutation
def parts_of_a_gather_shifted_by_one(programs: Programs, rng: random.Random) -> str:
    """One rank's part grows at the next one's cost, or ends early."""
    program, node = pick_node(programs, rng, _is(all_gather))
    parts = [list(part) for part in node.kwargs["parts"]]
    at = pick(rng, [i for i, part in enumerate(parts) if part and part[-1][1] - part[-1][0] > 1])
    start, stop = parts[at][-1]
    parts[at][-1] = (start, stop - 1)
    if at + 1 < len(parts) and parts[at + 1] and parts[at + 1][0][0] == stop and rng.random() < 0.7:
        parts[at + 1][0] = (stop - 1, parts[at + 1][0][1])
    places = on_ranks(programs, program, node, rng)
    for _program, n in places:
        with_keyword(n, parts=tuple(tuple(part) for part in parts))
    return f"{said(places)}: {parts}"


# -- messages ----------------------------------------------------------------------------------------------------------


@mutation
def send_lost(programs: Programs, rng: random.Random) -> str:
    program, node = pick_node(programs, rng, _is(send))
    node.graph.erase_node(node)
    return f"{node.name} on rank {program.rank}"


@mutation
def recv_lost(programs: Programs, rng: random.Random) -> str:
    """Its users read zeros in its place; sometimes the send goes, too."""
    program, node = pick_node(programs, rng, _is(recv))
    both = rng.random() < 0.5
    channel, source = node.kwargs["channel"], node.kwargs["source"]
    node.target, node.args, node.kwargs = torch.zeros, node.args[:1], {"dtype": node.args[1]}
    if both:
        sending = next(n for n in calls(programs[source], send) if n.kwargs["channel"] == channel)
        sending.graph.erase_node(sending)
    return f"{node.name} on rank {program.rank}{', and its send' if both else ''}"


@mutation
def message_doubled(programs: Programs, rng: random.Random) -> str:
    program, node = pick_node(programs, rng, _is(send, recv))
    add_after(node, node.target, node.args, dict(node.kwargs))
    return f"{node.name} on rank {program.rank}"


@mutation
def wrong_peer(programs: Programs, rng: random.Random) -> str:
    program, node = pick_node(programs, rng, _is(send, recv))
    key = "to" if node.target is send else "source"
    peer = pick(rng, [r for r in (*range(program.mesh.size), program.mesh.size) if r != node.kwargs[key]])
    with_keyword(node, **{key: peer})
    return f"{node.name} on rank {program.rank}: {key} {peer}"


@mutation
def peers_crossed(programs: Programs, rng: random.Random) -> str:
    """Two ranks of a stage send each other's share, and the receivers know."""
    program, node = pick_node(programs, rng, _is(send))
    channel, tp = node.kwargs["channel"], program.mesh.tp
    if tp == 1:
        raise NotHere
    target = programs[node.kwargs["to"]].stage
    group = [programs[program.stage * tp + i] for i in range(tp)]
    for i, sender in enumerate(group):
        receiver = programs[target * tp + (i + 1) % tp]
        for n in calls(sender, send):
            if n.kwargs["channel"] == channel:
                with_keyword(n, to=receiver.rank)
        for n in calls(receiver, recv):
            if n.kwargs["channel"] == channel:
                with_keyword(n, source=sender.rank)
    return f"channel {channel}"


@mutation
def wrong_channel(programs: Programs, rng: random.Random) -> str:
    program, node = pick_node(programs, rng, _is(send, recv))
    others = {n.kwargs["channel"] for p in programs for n in calls(p, send, recv)} | {99}
    channel = pick(rng, sorted(others - {node.kwargs["channel"]}))
    with_keyword(node, channel=channel)
    return f"{node.name} on rank {program.rank}: channel {channel}"


@mutation
def order_of_messages_swapped(programs: Programs, rng: random.Random) -> str:
    """Two sends or two recvs between the same ranks; where there is one only, a second, of other values, is made."""
    program, node = pick_node(programs, rng, _is(send, recv))
    peer = "to" if node.target is send else "source"
    others = [
        n for n in calls(program, node.target) if n is not node and n.kwargs[peer] == node.kwargs[peer]
    ]  # fmt: skip
    if others:
        other = rng.choice(others)
        a, b = sorted((node, other), key=list(node.graph.nodes).index)
        if node.target is send:
            b.append(a)  # what it sends is there still
        else:
            a.prepend(b)
        return f"{a.name} and {b.name} on rank {program.rank}"
    sender = program if node.target is send else programs[node.kwargs["source"]]
    receiver = programs[node.kwargs["to"]] if node.target is send else program
    first = next(n for n in calls(sender, send) if n.kwargs["channel"] == node.kwargs["channel"])
    wanted = next(n for n in calls(receiver, recv) if n.kwargs["channel"] == node.kwargs["channel"])
    negative = add_after(first, torch.neg, (first.args[0],), {})
    add_after(negative, send, (negative, *first.args[1:]), {**first.kwargs, "channel": 77})
    extra = add_after(wanted, recv, wanted.args, {**wanted.kwargs, "channel": 77})
    wanted.prepend(extra)
    return f"a second message between ranks {sender.rank} and {receiver.rank}, the other way round"


@mutation
def ranks_wait_for_each_other(programs: Programs, rng: random.Random) -> str:
    """A rank waits, before it comes to a send or a collective, for what another says after that only."""
    program, node = pick_node(programs, rng, _is(send, *COLLECTIVES))
    if node.target is send:
        other = programs[node.kwargs["to"]]
        after = next(n for n in calls(other, recv) if n.kwargs["channel"] == node.kwargs["channel"])
    else:
        peers = [p for p in programs if p.stage == program.stage and p is not program]
        other = pick(rng, peers)
        after = calls(other, *COLLECTIVES)[calls(program, *COLLECTIVES).index(node)]
    waits = add_after(node, recv, ((1,), torch.float64, "cpu"), {"source": other.rank, "channel": 55})
    node.prepend(waits)
    add_after(after, send, (after,), {"to": program.rank, "channel": 55})
    return f"rank {program.rank} before {node.name}, rank {other.rank} after {after.name}"


@mutation
def wrong_dtype_of_a_recv(programs: Programs, rng: random.Random) -> str:
    program, node = pick_node(programs, rng, _is(recv))
    dtype = pick(rng, [d for d in (torch.float16, torch.float32, torch.int64, torch.bool) if d != node.args[1]])
    with_argument(node, 1, dtype)
    return f"{node.name} on rank {program.rank}: {dtype}"


@mutation
def wrong_shape_of_a_recv(programs: Programs, rng: random.Random) -> str:
    program, node = pick_node(programs, rng, _is(recv))
    shape = list(node.args[0])
    at = rng.randrange(len(shape))
    other = rng.randrange(len(shape))
    if other != at and shape[other] is not shape[at]:
        shape[at], shape[other] = shape[other], shape[at]
    else:
        shape[at] = shape[at] - 1 if isinstance(shape[at], int) else node_meta.tensor(node).shape[at]
    with_argument(node, 0, tuple(shape))
    return f"{node.name} on rank {program.rank}: {shape}"


@mutation
def another_tensor_sent(programs: Programs, rng: random.Random) -> str:
    """A cut that uses a value too early: one of the same shape."""
    program, node = pick_node(programs, rng, _is(send))
    value = node_meta.val(node.args[0])
    earlier = []
    for n in node.graph.nodes:
        if n is node:
            break
        found = node_meta.val(n)
        if isinstance(found, torch.Tensor) and (found.shape, found.dtype) == (value.shape, value.dtype):
            earlier.append(n)
    source = pick(rng, [n for n in earlier if n is not node.args[0]])
    places = on_ranks(programs, program, node, rng)
    for other, n in places:
        theirs = [x for x in other.graph_module.graph.nodes if x.name == source.name]
        with_argument(n, 0, pick(rng, theirs))
    return f"{said(places)}: {source.name}"
