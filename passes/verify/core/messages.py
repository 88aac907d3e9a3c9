"""Checks what ranks send each other: every send meets its recv, every collective its peers', and nobody waits for ever.

A recv and a collective wait; a send does not. One vertex a send or recv, one for all calls of a collective, an edge
from each to the next on its rank and from each send to its recv: ranks hang exactly when this graph has a cycle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import networkx as nx
import torch
import torch.fx
from torch.fx import Node

from cost_model.plan.data import PlanData
from passes.fx import node_meta
from passes.fx.arguments import argument
from passes.ops.comm import COLLECTIVES, COMM_OPS, all_gather, log_sum_exp, recv, send
from passes.program.rank_program import RankProgram
from passes.verify.core.report import REPORT, Duty, described, fail, fail_plainly, on_rank, with_lines

Message = tuple[int, int, int]  # (from rank, to rank, channel)


def comm_nodes(program: RankProgram) -> list[Node]:
    """Returns the comm nodes of a program, in the order in which the rank comes to them."""
    return [n for n in program.graph_module.graph.nodes if n.op == "call_function" and n.target in COMM_OPS]


def message(program: RankProgram, node: Node) -> Message:
    """Returns what a send or recv names its message: (source, target, channel), global ranks."""
    peer = argument(node, 1, "to") if node.target is send else argument(node, 3, "source")
    channel = argument(node, 2, "channel") if node.target is send else argument(node, 4, "channel")
    if type(peer) is not int or not 0 <= peer < program.mesh.size or peer == program.rank:
        fail(program, node, f"its peer {peer!r} is no other rank of the mesh {program.mesh}")
    return (program.rank, peer, channel) if node.target is send else (peer, program.rank, channel)


def check_communication(programs: Sequence[RankProgram], plan: PlanData) -> None:
    """Checks sends, recvs and collectives of all ranks. Raises VerificationError. Local shapes of what is sent are
    checked where they are known (rank.py)."""
    nodes = {program.rank: comm_nodes(program) for program in programs}
    sends, recvs = check_messages(programs, nodes)
    for stage in range(plan.mesh.pp):
        check_collectives([programs[r] for r in plan.mesh.tp_group(stage)], nodes)
    check_order(programs, nodes, sends, recvs)
    _check_hops(programs, plan, sends)


# -- sends and recvs ---------------------------------------------------------------------------------------------------


def check_messages(
    programs: Sequence[RankProgram], nodes: dict[int, list[Node]]
) -> tuple[dict[Message, Node], dict[Message, Node]]:
    """Checks that every send has one recv, and the other way round, and that two ranks agree on the order of what
    they exchange."""
    sends: dict[Message, Node] = {}
    recvs: dict[Message, Node] = {}
    for program in programs:
        for node in nodes[program.rank]:
            if node.target not in (send, recv):
                continue
            table, key = sends if node.target is send else recvs, message(program, node)
            if key in table:
                fail(
                    program, node,
                    f"channel {key[2]} from rank {key[0]} to rank {key[1]} is used twice, by {table[key].name} too",
                )  # fmt: skip
            table[key] = node
    for one, other, verb in ((sends, recvs, "receives"), (recvs, sends, "sends")):
        for key, node in one.items():
            if key not in other:
                own, peer = (key[0], key[1]) if one is sends else (key[1], key[0])
                fail(programs[own], node, f"rank {peer} never {verb} it: {_nearest(key, other)}")
            theirs = other[key]
            if one is sends and _dtype_sent(node) != argument(theirs, 1, "dtype"):
                fail(
                    programs[key[1]], theirs,
                    f"waits for {argument(theirs, 1, 'dtype')} and gets {_dtype_sent(node)} from rank {key[0]} "
                    f"({described(node)})",
                )  # fmt: skip
            if one is sends and bool(node.kwargs.get("sized")) != (None in argument(theirs, 0, "shape")):
                fail(
                    programs[key[1]], theirs,
                    f"waits for {argument(theirs, 0, 'shape')}, and rank {key[0]} sends "
                    f"{'its shape ahead' if node.kwargs.get('sized') else 'no shape ahead'} ({described(node)})",
                )  # fmt: skip
    pairs = dict.fromkeys((key[0], key[1]) for key in sends)
    for source, target in pairs:
        order = [key[2] for key in sends if key[:2] == (source, target)]
        wanted = [key[2] for key in recvs if key[:2] == (source, target)]
        if order != wanted:
            at = next(i for i, (a, b) in enumerate(zip(order, wanted, strict=True)) if a != b)
            fail(
                programs[target], recvs[source, target, wanted[at]],
                f"waits for channel {wanted[at]} where rank {source} sends channel {order[at]} "
                f"({sends[source, target, order[at]].name}): messages between two ranks must keep their order",
            )  # fmt: skip
    return sends, recvs


def _dtype_sent(node: Node) -> Any:
    value = node_meta.val(node.args[0])
    return value.dtype if isinstance(value, torch.Tensor) else None


def _nearest(key: Message, table: dict[Message, Node]) -> str:
    """Formats what the peer does instead."""
    source, target, channel = key
    same_pair = [k[2] for k in table if k[:2] == (source, target)]
    if same_pair:
        return f"channel {channel} is none of those between ranks {source} and {target}, {sorted(same_pair)}"
    same_channel = [k for k in table if k[2] == channel]
    if same_channel:
        ways = ", ".join(f"rank {k[0]} to rank {k[1]}" for k in same_channel[:3])
        return f"channel {channel} goes from {ways} there, not from rank {source} to rank {target}"
    return f"nothing there names channel {channel} from rank {source} to rank {target}"


def _check_hops(programs: Sequence[RankProgram], plan: PlanData, sends: dict[Message, Node]) -> None:
    """Checks that messages are the plan's hops, between ranks of the same place in their stages."""
    mesh = plan.mesh
    planned = {
        (mesh.rank(h.source, t), mesh.rank(h.target, t), h.channel): h for h in plan.hops for t in range(mesh.tp)
    }
    for key, node in sends.items():
        if key not in planned:
            fail(
                programs[key[0]], node,
                f"the plan sends nothing on channel {key[2]} from rank {key[0]} to rank {key[1]}",
            )  # fmt: skip
    for key, hop in planned.items():
        if key not in sends:
            fail_plainly(
                f"{on_rank(programs[key[0]])} never sends {hop.op}, which the plan sends to rank {key[1]} on "
                f"channel {hop.channel}",
                Duty.MESSAGES,
            )


# -- collectives -------------------------------------------------------------------------------------------------------


def collective_words(node: Node) -> tuple[Any, ...]:
    """Returns all that the ranks of a group must agree on, but for the tensor itself."""
    value = node_meta.val(node.args[0])
    of_value = (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else (None, None)
    name = node.target.__name__
    if node.target is all_gather:
        parts = argument(node, 3, "parts")
        return name, argument(node, 1, "axis"), argument(node, 2, "dim"), tuple(map(tuple, parts)), *of_value
    if node.target is log_sum_exp:
        return name, argument(node, 1, "axis"), argument(node, 2, "dim"), argument(node, 3, "ranks"), *of_value
    return name, argument(node, 1, "axis"), None, None, *of_value


_WORDS = ("op", "axis", "dim", "parts", "shape", "dtype")


def check_collectives(group: Sequence[RankProgram], nodes: dict[int, list[Node]]) -> None:
    """Checks that every rank of a tp group comes to the same collectives in the same order."""
    ranks = [[n for n in nodes[p.rank] if n.target in COLLECTIVES] for p in group]
    first = ranks[0]
    for node in first:
        if argument(node, 1, "axis") != "tp" or group[0].mesh.tp == 1:
            fail(group[0], node, f"no axis {argument(node, 1, 'axis')!r} to speak along")
    for program, own in zip(group[1:], ranks[1:], strict=True):
        for theirs, mine in zip(first, own, strict=False):
            a, b = collective_words(theirs), collective_words(mine)
            differing = [word for word, x, y in zip(_WORDS, a, b, strict=True) if x != y]
            if differing or (len(first) != len(own) and theirs.args[0].name != mine.args[0].name):
                fail(
                    program, mine,
                    f"rank {group[0].rank} comes to {described(theirs)} of {theirs.args[0].name} at this point, and "
                    f"this is {mine.target.__name__} of {mine.args[0].name}; "
                    + (f"they differ in {', '.join(differing)}" if differing else "one of them is missing or too many"),
                )  # fmt: skip
        if len(first) != len(own):
            longer, lost = (group[0], program) if len(first) > len(own) else (program, group[0])
            extra = (first if longer is group[0] else own)[min(len(first), len(own))]
            fail(longer, extra, f"rank {lost.rank} never comes to this collective: the ranks would hang")


# -- no deadlock -------------------------------------------------------------------------------------------------------


def check_order(
    programs: Sequence[RankProgram],
    nodes: dict[int, list[Node]],
    sends: dict[Message, Node],
    recvs: dict[Message, Node],
) -> None:
    """Checks that what happens before what, over all ranks, has no cycle."""
    graph: nx.DiGraph[Any] = nx.DiGraph()
    vertex: dict[Node, Any] = {}
    for program in programs:
        before, count = None, 0
        for node in nodes[program.rank]:
            if node.target in COLLECTIVES:
                vertex[node] = ("collective", program.stage, count)
                count += 1
            else:
                vertex[node] = node
            graph.add_node(vertex[node])
            graph.nodes[vertex[node]].setdefault("calls", []).append((program, node))
            if before is not None:
                graph.add_edge(before, vertex[node])
            before = vertex[node]
    for key, node in sends.items():
        if key in recvs:
            graph.add_edge(vertex[node], vertex[recvs[key]])
    try:
        cycle = nx.find_cycle(graph)
    except nx.NetworkXNoCycle:
        return
    words: list[str] = []
    for u, _ in cycle:
        calls = graph.nodes[u]["calls"]
        ranks = ", ".join(str(p.rank) for p, _ in calls)
        words.append(f"rank{'s' if len(calls) > 1 else ''} {ranks}: {described(calls[0][1])}")
    cause = REPORT.format("the order of comm nodes")
    message = f"these would wait for each other for ever: {' -> '.join([*words, words[0]])}; {cause}"
    program, node = graph.nodes[cycle[0][0]]["calls"][0]
    raise with_lines(program, node, message)
