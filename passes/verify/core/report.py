"""Formats what a check finds wrong: the rank, the node with its shape, the user's source line, and the way out.

Which pass is to blame is read off the node: each pass's work has its stamp (passes/fx/run_passes.py). Where a node is
missing, or is still as the model has it, no stamp can say so, and the check names the duty that was not done.
"""

from __future__ import annotations

import enum
from typing import NoReturn

import torch
import torch.fx
from torch.fx import Node

from cost_model.errors import VerificationError
from passes.fx import node_meta
from passes.fx.arguments import submodule
from passes.fx.text import node_text
from passes.ops.comm import COLLECTIVES, copy_to_tp, recv, send
from passes.ops.parallel_layers import one_gradient
from passes.program.rank_program import RankProgram

REPORT = "this is a bug in {}: please report it with the plan (compiled.plan.save(...)) and the model's config"
LINES_AROUND = 10


class Duty(enum.Enum):
    """A step in making a rank's program of the model's graph, and the file whose duty it is."""

    NODES = "passes/partition/extract_stage.py"  # the nodes of a stage, copied as the model has them; what it returns
    WEIGHTS = "passes/partition/shard_parameters.py"
    SIZES = "passes/partition/localize_shapes.py"
    CACHE = "passes/partition/localize_cache.py"
    COLLECTIVES = "passes/partition/insert_collectives.py"
    MESSAGES = "passes/partition/insert_send_recv.py"
    GRADIENTS = "passes/partition/insert_gradient_sums.py"
    GRADIENT_SUMS = "passes/program/gradient_sums.py"
    ENCODER = "passes/normalize/split_encoder.py"
    PLAN = "cost_model/search/planner.py"


def on_rank(program: RankProgram) -> str:
    """Formats a program's place: "rank 3 (stage 1, tp rank 1)"."""
    return f"rank {program.rank} (stage {program.stage}, tp rank {program.tp_rank})"


def described(node: Node) -> str:
    """Formats a node: "o_proj (RowParallelLinear, float32[B, S, 48], modeling_x.py:241)"; shapes are the whole
    tensor's."""
    words = [_target(node)]
    value, symbols = node_meta.val(node), node_meta.symbols(node)
    if isinstance(value, torch.Tensor):
        dims = symbols if symbols and len(symbols) == value.dim() else ("",) * value.dim()
        sizes = ", ".join(s or str(n) for n, s in zip(value.shape, dims, strict=True))
        words.append(f"{str(value.dtype).removeprefix('torch.')}[{sizes}]")
    if node_meta.source(node):
        words.append(node_meta.source(node))
    return f"{node.name} ({', '.join(words)})"


def _target(node: Node) -> str:
    if node.op == "call_module":
        return type(submodule(node.graph.owning_module, str(node.target))).__name__
    return getattr(node.target, "__name__", str(node.target)) if node.op.startswith("call") else node.op


def fail(
    program: RankProgram,
    node: Node,
    what: str,
    *,
    missing: Duty | None = None,
    untouched: Duty | None = None,
    inputs: bool = False,
) -> NoReturn:
    """Raises VerificationError for `node`, with the lines of the graph around it as a note.

    To blame is the pass that made the node or last changed its target or numbers; with `inputs`, that which last
    changed what it reads. `untouched`: the duty to change it, where it is still as the model has it. `missing`: the
    duty to put something before it, whoever made the node itself.
    """
    file = _to_blame(node, missing, untouched, inputs)
    raise with_lines(program, node, f"{on_rank(program)}, {described(node)}: {what}; {REPORT.format(file)}")


def fail_plainly(what: str, duty: Duty) -> NoReturn:
    """Raises VerificationError for something that no single node stands for."""
    raise VerificationError(f"{what}; {REPORT.format(duty.value)}")


def _to_blame(node: Node, missing: Duty | None, untouched: Duty | None, inputs: bool) -> str:
    if missing is not None:
        return missing.value
    stamp = node_meta.wired_by(node) if inputs else node_meta.made_by(node)
    file = f"passes/{stamp}.py"
    if untouched is not None and (not stamp or file == Duty.NODES.value):
        return untouched.value
    return file if stamp else _duty_of_kind(node).value


def _duty_of_kind(node: Node) -> Duty:
    """Returns whose work such nodes are, where no stamp says: a program that was read from a file has none."""
    if node.target in COLLECTIVES:
        return Duty.COLLECTIVES
    if node.target in (send, recv):
        return Duty.MESSAGES
    return Duty.GRADIENTS if node.target in (copy_to_tp, one_gradient) else Duty.NODES


def with_lines(program: RankProgram, node: Node, message: str) -> VerificationError:
    """The error, with the ten lines of the rank's graph around `node` as a note."""
    nodes = list(program.graph_module.graph.nodes)
    error = VerificationError(message)
    if node in nodes:
        at = nodes.index(node)
        first = max(0, min(at - LINES_AROUND // 2, len(nodes) - LINES_AROUND))
        lines = [
            f"{'>' if one is node else ' '} {node_text(program.graph_module, one)}"
            for one in nodes[first : first + LINES_AROUND]
        ]
        error.add_note("\n".join([f"around {node.name} in the graph of rank {program.rank}:", *lines]))
    return error
