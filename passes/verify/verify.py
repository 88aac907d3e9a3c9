"""verify: proves, before anything runs, that the programs of all ranks together compute what the model computes.

What is checked is what will run, the emitted graphs; the plan and the model's op graph are what they are held against.

    core/messages.py            every send meets its recv, every collective its peers, nobody waits for ever
    weights.py                  every element is where the plan says, ties are kept
    rank.py                     each node is the model's tensor, or a known share of it, or a sum still owed that an
                                all_reduce pays before anything takes it for the whole; local shapes fit
    groups.py                   sums have each term once, outputs come out once, cache layers too
    gradients/contributions.py  in programs to be trained: backward, each value's gradient is whole, or a term of a sum
                                that is added up once (gradients/sums.py: those of parameters)
    nodes/experts.py            experts that ranks have whole: each adds its term once, on the rank that has it
    nodes/literals.py           numbers and settings that the op graph does not have (the scale of a softmax, an eps,
                                which element an index takes), where the model's own graph is given to compare with
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.fx

from cost_model.errors import VerificationError
from cost_model.graph.op_graph import SOURCES, OpGraph, TensorRef
from cost_model.plan.data import PlanData
from passes.fx import node_meta
from passes.fx.arguments import fetch, tensor_source
from passes.op_graph.build import parameter_names
from passes.program.rank_program import RankProgram
from passes.verify.core.messages import check_communication
from passes.verify.core.report import on_rank
from passes.verify.core.state import Tools
from passes.verify.gradients.contributions import check_gradients
from passes.verify.groups import check_caches, check_group, check_outputs
from passes.verify.nodes.literals import nodes_by_name
from passes.verify.rank import interpret
from passes.verify.weights import check_weights


def verify(
    programs: Sequence[RankProgram],
    plan: PlanData,
    graph: OpGraph,
    whole: torch.fx.GraphModule | None = None,
) -> None:
    """Proves the programs of ranks 0, 1, ... of the plan's mesh against the model. `graph` is the op graph that the
    plan was made for, and `whole` the normalised graph that this was made of.

    Raises VerificationError, which names the rank, the node and the user's source line.
    """
    _check_programs(programs, plan, graph)
    check_communication(programs, plan)
    check_weights(programs, plan, graph)
    tools = Tools(plan, graph, {} if whole is None else nodes_by_name(whole))
    facts = [interpret(program, tools) for program in programs]  # by stage: senders before receivers
    for stage in range(plan.mesh.pp):
        check_group([facts[r] for r in plan.mesh.tp_group(stage)])
    check_outputs(facts, plan, graph, None if whole is None else _output_names(whole, graph))
    check_caches(facts, plan, graph)
    check_gradients(facts, plan.mesh.pp)


def _output_names(whole: torch.fx.GraphModule, graph: OpGraph) -> dict[str, TensorRef]:
    """Returns the model's outputs by their names in what it returns, as RankFacts.outputs."""
    sources = parameter_names(whole)
    found: dict[str, TensorRef] = {}
    output = next(node for node in reversed(whole.graph.nodes) if node.op == "output")
    for name, value in output.args[0].items():
        nodes: list[torch.fx.Node] = []
        torch.fx.node.map_arg(value, nodes.append)
        tensors = [node for node in nodes if node_meta.is_tensor(node)]
        for position, node in enumerate(tensors):
            own = fetch(whole, str(node.target)) if node.op == "get_attr" else None
            ref = TensorRef(*tensor_source(node)) if own is None else TensorRef(sources[id(own)])
            found[name if len(tensors) == 1 else f"{name}[{position}]"] = ref
    return found


def _check_programs(programs: Sequence[RankProgram], plan: PlanData, graph: OpGraph) -> None:
    ranks = [program.rank for program in programs]
    if ranks != list(range(plan.mesh.size)):
        raise VerificationError(f"the plan is for ranks 0 to {plan.mesh.size - 1}, and there are programs of {ranks}")
    lost = [op.name for op in graph if op.kind not in SOURCES and not plan.has_op(op.name)]
    if lost:
        raise VerificationError(f"the plan says nothing of {lost[0]} ({graph[lost[0]]}): it is another model's")
    for program in programs:
        if program.mesh != plan.mesh:
            raise VerificationError(f"{on_rank(program)} is made for {program.mesh}, and the plan is for {plan.mesh}")
        try:
            program.graph_module.graph.lint()
        except RuntimeError as error:
            raise VerificationError(f"{on_rank(program)}: its graph is malformed: {error}") from error
