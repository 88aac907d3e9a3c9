"""Fills a rank's program of a transformers model: finds tied names, and the buffers that no checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from autodist_fx.weights.load import LoadReport, load_rank
from autodist_fx.weights.names import resolve_names
from autodist_fx.weights.share import share_weights
from autodist_fx.weights.sources.source import WeightSource
from autodist_fx.weights.versions import name_rules, tied_names
from passes.program.rank_program import RankProgram


def load_program(
    model: PreTrainedModel,
    source: WeightSource,
    buffers: Mapping[str, torch.Tensor],
    program: RankProgram,
    *,
    device: torch.device | str = "cpu",
    requires_grad: bool | None = False,
    progress: Callable[[int, int], None] | None = None,
) -> LoadReport:
    """Fill a program of `model` from a checkpoint, for inference: no parameter requires a gradient. With
    `requires_grad` None, each requires what the model's own does.

    `buffers` has the real values of the buffers and constants of the model's graphs, by name. Raises CheckpointError.
    """
    return load_rank(
        program,
        source,
        device=device,
        buffers=_missing_buffers(buffers, model, source),
        tied=tied_names(model),
        **name_rules(model),
        requires_grad=requires_grad,
        progress=progress,
    )


def load_beside(
    program: RankProgram, other: RankProgram, load: Callable[[RankProgram], LoadReport], report: LoadReport
) -> LoadReport:
    """Give `other` the weights of `program`, which is loaded, and load the
    slices that only `other` holds. Returns the report of both loads together."""
    left = share_weights(program, other)
    if not left.param_shards:
        return report
    more = load(left)
    return replace(
        more,
        shard_bytes=report.shard_bytes + more.shard_bytes,
        bytes_read=report.bytes_read + more.bytes_read,
        seconds=report.seconds + more.seconds,
        rss_before_bytes=report.rss_before_bytes,
        start_seconds=report.start_seconds,
    )


def _missing_buffers(
    values: Mapping[str, torch.Tensor], model: PreTrainedModel, source: WeightSource
) -> Mapping[str, torch.Tensor]:
    """Return the real values, by name, of tensors that the checkpoint
    lacks: non-persistent buffers, and constants of the graph."""
    saved = set(values) & model.state_dict().keys()
    found = resolve_names(saved, source.names(), **name_rules(model)) if saved else {}
    return {name: value for name, value in values.items() if name not in found and not value.is_meta}
