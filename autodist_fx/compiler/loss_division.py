"""Divides the losses of a traced model over a whole batch, for graphs that are run on parts of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.fx

from autodist_fx.compiler.examples import normalized
from autodist_fx.tracing import TracedModel
from passes.fx import node_meta
from passes.fx.node_meta import Phase
from passes.fx.run_passes import run_passes
from passes.losses.divide_losses import LossContext, divide_losses
from passes.normalize.eliminate_dead_code import eliminate_dead_code


@dataclass(frozen=True, slots=True)
class LossDivision:
    """The numbers that a graph's loss is divided by: see passes.losses.divide_losses.py.

    `inputs`: inputs that the graph has beside the model's, numbers of these dtypes. `counts` returns {name of such an
    input: what one microbatch counts of it}; None where nothing is counted.
    """

    inputs: Mapping[str, torch.dtype]
    counts: torch.fx.GraphModule | None


def divide(traced: TracedModel) -> LossDivision:
    """Normalise a traced graph where that was not done, and let it return its loss as a part of a whole batch's, and
    nothing else. Raises PlanError for a mean over rows whose number the inputs do not tell."""
    module = normalized(traced).graph_module
    ctx = LossContext(Phase.NORMALIZED)
    run_passes((divide_losses, eliminate_dead_code), module, ctx)
    node_meta.set_history(module, (*node_meta.history(module), *ctx.history))
    module.recompile()
    return LossDivision(dict(ctx.inputs), ctx.counts)
