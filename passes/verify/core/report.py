"""How a check says what is wrong: the rank, the node with its shape, the user's source line, and the way out."""

from __future__ import annotations

from typing import NoReturn

import torch
import torch.fx
from torch.fx import Node

from cost_model.errors import VerificationError
from passes.fx import node_meta
from passes.fx.arguments import submodule
from passes.program.rank_program import RankProgram

REPORT = "this is a bug in {}: please report it with the plan (compiled.plan.save(...)) and the model's config"


def on_rank(program: RankProgram) -> str:
    """ "rank 3 (stage 1, tp rank 1)"."""
    return f"rank {program.rank} (stage {program.stage}, tp rank {program.tp_rank})"


def described(node: Node) -> str:
    """ "o_proj (RowParallelLinear, float32[B, S, 48], modeling_x.py:241)"; shapes are the whole tensor's."""
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


def fail(program: RankProgram, node: Node, what: str, fault: str) -> NoReturn:
    """Raise for `node`; `fault` is the file of the pass whose work it is."""
    raise VerificationError(f"{on_rank(program)}, {described(node)}: {what}; {REPORT.format(fault)}")


def fail_plainly(what: str, fault: str) -> NoReturn:
    """Raise for something that no single node stands for."""
    raise VerificationError(f"{what}; {REPORT.format(fault)}")
