"""Compares the gradients of all ranks in float64 with those of the model's own graph.

After the gradient sums that its program owes, each rank must hold its slice of the whole gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from autodist_fx.errors import AutodistError
from autodist_fx.numeric.check import TOLERANCE, CheckedVariant, difference, failure, refusal
from autodist_fx.numeric.factored import sliced
from autodist_fx.numeric.float64_interpreter import Doubles, Weights, double_by_default, of_rank, of_whole
from autodist_fx.runtime.training.backward import go_back
from autodist_fx.runtime.training.gradient_sums import Gradients, pay_sums
from autodist_fx.simulation.thread_communicator import ThreadCommunicator, ThreadWorld
from cost_model.errors import VerificationError
from passes.fx.arguments import fetch
from passes.fx.differentiable import wants_gradient
from passes.ops.comm import Tape, using
from passes.program.rank_program import RankProgram

_ROOT = "loss"


def check_gradients(checked: CheckedVariant, weights: Weights, inputs: Mapping[str, Any]) -> None:
    """Compare every rank's gradients with its slices of the whole model's. `weights` must be few (no Factored ones).

    Raises VerificationError, which names the rank and the parameter; AutodistError where the model returns no loss for
    these inputs.
    """
    with torch.enable_grad(), double_by_default():
        wanted = _of_whole(checked, weights, inputs)
        world = ThreadWorld(checked.plan.mesh)
        try:
            of_ranks: list[Gradients] = world.run(
                lambda rank, communicator: _of_rank(checked.programs[rank], weights, inputs, communicator)
            )
        except Exception as error:
            raise VerificationError(f"backward, {failure(error)}") from error
    largest = max((float(g.abs().max()) for g in wanted.values() if g.numel()), default=0.0)
    for program, gradients in zip(checked.programs, of_ranks, strict=True):
        for path, parameter in program.graph_module.named_parameters():
            shard = program.param_shards[path]
            if not wants_gradient(parameter):
                continue
            whole = wanted.get(shard.source)
            if whole is None:
                differs = bool(gradients[path].any())
            else:
                share = whole if shard.dim is None else sliced(whole, shard.dim, shard.intervals)
                # A gradient of mere rounding (of a bias that softmax cancels) is measured against the largest gradient.
                scale = max(float(whole.abs().max()), 1e-6 * largest)
                differs = difference(gradients[path], share, scale) > TOLERANCE
            if differs:
                raise VerificationError(
                    f"rank {program.rank} ends with another gradient of {path} than its share of {shard.source}'s"
                )


def _of_whole(checked: CheckedVariant, weights: Weights, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the whole model's gradients by parameter name, without parameters that the loss does not depend on."""
    leaves: dict[str, torch.Tensor] = {}
    plain = of_whole(checked.whole, checked.names, weights)

    def tensor_at(path: str) -> torch.Tensor | None:
        tensor = fetch(checked.whole, path)
        return _leaf(leaves, checked.names[id(tensor)], plain(path)) if wants_gradient(tensor) else plain(path)

    try:
        loss = Doubles(checked.whole, tensor_at).values(inputs).get(_ROOT)
    except Exception as error:
        raise refusal(checked, error) from error
    if loss is None or not loss.requires_grad:
        raise AutodistError(f"{checked.plan.model} returns no loss that could be gone back from: no gradients to check")
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {name: g for name, g in zip(leaves, found, strict=True) if g is not None}


def _of_rank(
    program: RankProgram, weights: Weights, inputs: Mapping[str, Any], communicator: ThreadCommunicator
) -> Gradients:
    """Return one rank's gradients, by the first path of each
    parameter; zeros where the loss does not depend on one here."""
    first = {id(p): name for name, p in program.graph_module.named_parameters()}
    leaves: dict[str, torch.Tensor] = {}
    plain: Callable[[str], torch.Tensor | None] = of_rank(program, weights)

    def tensor_at(path: str) -> torch.Tensor | None:
        tensor = fetch(program.graph_module, path)
        return _leaf(leaves, first[id(tensor)], plain(path)) if wants_gradient(tensor) else plain(path)

    for name in first.values():
        tensor_at(name)
    tape = Tape()
    with using(communicator, tape):
        loss = Doubles(program.graph_module, tensor_at).values(inputs).get(_ROOT)
        of_leaves = go_back(tape, communicator, loss, list(leaves.values()))
    pairs = zip(leaves.items(), of_leaves, strict=True)
    gradients = {name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in pairs}
    pay_sums(program, gradients, communicator)
    return gradients


def _leaf(leaves: dict[str, torch.Tensor], name: str, value: torch.Tensor | None) -> torch.Tensor | None:
    """Return the autograd leaf of a name, made from `value` on first use."""
    if value is not None and name not in leaves:
        leaves[name] = value.detach().clone().requires_grad_()
    return leaves.get(name)
