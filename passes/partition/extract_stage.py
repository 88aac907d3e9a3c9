"""extract_stage: takes the part that one pipeline stage runs from the whole model's graph.

    before  %a = layer_0(%x); %b = layer_1(%a, %mask); return {"logits": %b}
    after   (stage 1)  %incoming = placeholder[hop 0]; %mask = ...; %b = layer_1(%incoming, %mask)
                       return ({"logits": %b}, ())

Graph inputs go to every stage. What the plan has recomputed is computed again; what it has sent becomes a placeholder
here and a second output there, which insert_send_recv turns into communication. Of experts that are dealt to tp ranks,
a rank has its own (own_experts).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch.fx import Node
from torch.fx.node import map_arg

from cost_model.errors import PlanError
from cost_model.plan.data import Hop
from passes.fx import node_meta
from passes.fx.arguments import tensor_source
from passes.fx.lazy_graph_module import LazyGraphModule
from passes.fx.run_passes import PassResult
from passes.partition.context import RankContext
from passes.partition.own_experts import copy_own


def extract_stage(whole: torch.fx.GraphModule, ctx: RankContext) -> PassResult:
    """Returns a new GraphModule with this stage's nodes; `whole`, the normalised graph of the model, is left as it is.

    Matches are the nodes of `whole` that the stage has, by name; the others are removed.

    The new graph takes the model's inputs and one placeholder for each hop into the stage (`meta["hop"]`). It returns
    (outputs of the model that this stage has, tensors that it owes to later stages in the order of their channels).
    """
    stage, plan = ctx.stage, ctx.plan
    graph = torch.fx.Graph()
    env: dict[Node, Node] = {}
    made: dict[tuple[str, int], Node] = {}
    last_input: Node | None = None
    incoming = {(h.op, h.index, h.whole): h for h in plan.hops if h.target == stage}
    received: dict[tuple[str, int], list[Node]] = {}
    numbers = _numbers(whole, ctx)

    for node in whole.graph.nodes:
        if node.op == "placeholder":
            last_input = env[node] = graph.node_copy(node)
            made[node.name, 0] = env[node]
            continue
        if node.op == "output":
            break
        source = tensor_source(node)
        if node.op == "get_attr":
            env[node] = graph.node_copy(node)  # those that nothing uses go below
        elif plan.has_op(node.name):
            copied = None
            if stage in plan.op(node.name).stages or node in numbers:
                if node not in numbers or all(n in env for n in node.all_input_nodes):
                    copied = copy_own(graph, node, ctx, lambda n: env[n] if n in env else _read_off(n, env, graph))
            if copied is not None:
                env[node] = made[source] = copied
        elif node.args[0] in env:  # an element of a tuple that is computed here
            env[node] = graph.node_copy(node, env.__getitem__)
            made[source] = env[node]
        if node not in env and node_meta.is_tensor(node) and any((*source, form) in incoming for form in (True, False)):
            hops = [incoming[*source, form] for form in (False, True) if (*source, form) in incoming]
            received[source] = []
            for hop in hops:
                with graph.inserting_after(last_input):
                    last_input = _incoming(graph, node, hop)
                received[source].append(last_input)
            env[node] = received[source][0]  # insert_collectives takes the form that each user wants

    outputs = _own_outputs(whole, env, stage, ctx)
    owed = tuple(made[h.op, h.index] for h in plan.hops if h.source == stage)
    graph.output((outputs, owed))
    for node in reversed(list(graph.nodes)):
        if not node.users and (node.op == "get_attr" or tensor_source(node)[0] != node.name):
            graph.erase_node(node)  # a weight, or an element of a tuple
    module = LazyGraphModule(whole, graph, class_name=f"{whole.__class__.__name__}Rank{ctx.rank}")
    ctx.received = {source: tuple(nodes) for source, nodes in received.items()}
    before, after = ({node.name for node in g.nodes} for g in (whole.graph, graph))
    return PassResult(module, len(before & after), inserted=len(after - before), removed=len(before - after))


def _numbers(whole: torch.fx.GraphModule, ctx: RankContext) -> set[Node]:
    """Returns the sizes, devices and the like that this stage's ops use, wherever the plan has them: they are computed
    again.

    At their own place among the others, since a cache asked for its length after an update gives another answer.
    """
    needed: set[Node] = set()

    def note(node: Node) -> None:
        for used in node.all_input_nodes:
            known = ctx.plan.has_op(used.name) and ctx.plan.op(used.name).kind.startswith("scalar.")
            if known and used not in needed:
                needed.add(used)
                note(used)

    for node in whole.graph.nodes:
        if ctx.plan.has_op(node.name) and ctx.stage in ctx.plan.op(node.name).stages:
            note(node)
    return needed


def _read_off(number: Node, env: dict[Node, Node], graph: torch.fx.Graph) -> Node:
    """Returns a node for a size that another stage reads off a tensor of its own, read off a tensor that this stage
    has.

    Raises PlanError where it has none of that length.
    """
    symbol = node_meta.size_symbol(number)
    for there, here in reversed(env.items()):
        symbols = node_meta.symbols(there)
        if symbol and node_meta.is_tensor(there) and symbol in symbols:
            dim = symbols.index(symbol)
            env[number] = graph.call_function(torch.ops.aten.sym_size.int, (here, dim))
            node_meta.copy(number, env[number])
            node_meta.set_val(env[number], node_meta.tensor(there).shape[dim])
            return env[number]
    known = all(not node_meta.is_tensor(n) or n in env for n in number.all_input_nodes)
    if number.op == "call_function" and number.all_input_nodes and known:
        env[number] = graph.node_copy(number, lambda n: env[n] if n in env else _read_off(n, env, graph))
        return env[number]
    raise PlanError(
        f"a later stage needs the length {number.name} ({node_meta.where(number)}), which is read off a tensor that "
        f"it does not have: use fewer stages"
    )


def _incoming(graph: torch.fx.Graph, node: Node, hop: Hop) -> Node:
    name = f"incoming_{node.name}" if hop.whole else f"incoming_part_{node.name}"
    placeholder = graph.placeholder(name)
    node_meta.copy(node, placeholder)
    node_meta.set_hop(placeholder, hop)
    return placeholder


def _own_outputs(whole: torch.fx.GraphModule, env: dict[Node, Node], stage: int, ctx: RankContext) -> dict[str, Any]:
    """Returns the entries of the model's output dict that are made in this stage; the cache is on every stage."""
    output = next(n for n in reversed(whole.graph.nodes) if n.op == "output")
    found: dict[str, Any] = {}
    for key, value in output.args[0].items():
        homes: set[int] = set()

        def note(n: Node, homes: set[int] = homes) -> Node:
            name, _ = tensor_source(n)
            if ctx.plan.has_op(name):
                homes.add(ctx.plan.op(name).home)
            return n

        map_arg(value, note)
        if not homes or homes == {stage}:
            found[key] = map_arg(value, lambda n: env[n])
        elif len(homes) > 1 and stage == max(homes):
            raise NotImplementedError(f"output {key} is made of tensors of several stages")
    return found
