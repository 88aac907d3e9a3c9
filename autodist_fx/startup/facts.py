"""States what ranks must hold alike: what they were asked for, the model and its weights, and the slices that
several hold."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from autodist_fx.calls.tensor_digest import tensor_digest
from autodist_fx.runtime.comm.agreement import digest
from autodist_fx.weights.sources.source import WeightSource
from cost_model.costs.hardware import Hardware
from cost_model.graph.placement import Interval
from cost_model.partition_plan import PartitionPlan
from cost_model.plan.data import PlanData
from cost_model.plan.write_json import plan_to_text
from cost_model.request.plan_request import PlanRequest
from passes.program.rank_program import RankProgram

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

_SHOWN = 60  # characters of a value that an error shows
_OF_THE_FILE = ("_name_or_path", "transformers_version", "_attn_implementation_internal")  # say nothing of the model
Piece = tuple[int | None, Interval]  # elements of a dim; (None, ...): the whole tensor


def request_facts(
    entry: str, request: PlanRequest, plan: PartitionPlan | None, *, verify: bool, **more: object
) -> dict[str, str]:
    """Return the facts of what a rank was asked for: `entry` is the public function that was called, `more` its
    other arguments."""
    facts = {
        "the function called": entry,
        "objective": request.objective,
        "hardware": _hardware_text(request.hardware),
        "pin": request.pin,
        "cuts": request.cuts,
        "max_memory": request.max_memory,
        "device_map": tuple(map(_hardware_text, request.devices)),
        "plan": "" if plan is None else digest(plan_to_text(plan)),
        "verify": verify,
        **more,
    }
    return {name: _shown(value) for name, value in facts.items()}


def model_facts(
    model: PreTrainedModel, generation_config: GenerationConfig | None, open_weights: Callable[[], WeightSource]
) -> dict[str, str]:
    """Return the facts of the model that a rank has found, and a fingerprint of its weights. Raises CheckpointError."""
    source = open_weights()
    try:
        weights = source.fingerprint()
    finally:
        source.close()
    return {
        "the model's class": type(model).__name__,
        "the weights' dtype": str(model.dtype).removeprefix("torch."),
        "the config": _of_config(model.config.to_dict()),
        "the generation config": "" if generation_config is None else _of_config(generation_config.to_dict()),
        "the content of the weights": f"fingerprint {weights}",
    }


def shared_weight_facts(plan: PlanData, program: RankProgram) -> dict[str, str]:
    """Return a digest of each piece of a weight that this rank holds and others do, too. `program` is loaded."""
    shared, facts = pieces_of_several(plan, program.rank), {}
    state = dict(program.graph_module.named_parameters(remove_duplicate=False))
    for name, shard in program.param_shards.items():
        for dim, (start, stop) in shared.get(shard.source, ()):
            at = _place(shard.dim, shard.intervals, dim, start, stop)
            if name not in state or at is None:
                continue
            tensor = state[name] if dim is None else state[name].narrow(dim, at, stop - start)
            place = "" if dim is None else f" [{start}:{stop} of dim {dim}]"
            facts[f"{shard.source}{place}"] = f"{str(tensor.dtype).removeprefix('torch.')} {tensor_digest(tensor)}"
    return facts


def pieces_of_several(plan: PlanData, rank: int) -> Mapping[str, list[Piece]]:
    """Return, by parameter, the largest pieces that this rank and the same others hold, of those that others hold at
    all."""
    stage, tp_rank = plan.mesh.coordinates(rank)
    found = {}
    for param in plan.params:
        if stage in param.stages:
            layout = plan.layout(param.layout) if param.placement.is_shard else None
            pieces: Iterator[Piece]
            if layout is not None:
                pieces = ((param.placement.dim, p) for p in _held_by(layout.parts, tp_rank, len(param.stages)))
            else:
                several = param.placement.is_replicate and plan.mesh.tp * len(param.stages) > 1
                pieces = iter([(None, (0, 0))] if several else [])
            found[param.name] = list(pieces)
    return found


def _held_by(parts: tuple[tuple[Interval, ...], ...], tp_rank: int, stages: int) -> Iterator[Interval]:
    edges = sorted({edge for part in parts for interval in part for edge in interval})
    for start, stop in itertools.pairwise(edges):
        holders = [r for r, part in enumerate(parts) if any(a <= start and stop <= b for a, b in part)]
        if tp_rank in holders and len(holders) * stages > 1:
            yield start, stop


def _place(
    shard_dim: int | None, intervals: tuple[Interval, ...], dim: int | None, start: int, stop: int
) -> int | None:
    """Return where the piece begins in a shard of those intervals; None where the shard has not all of it."""
    if dim is None:
        return 0 if shard_dim is None else None
    before = 0
    for a, b in intervals if shard_dim == dim else ():
        if a <= start and stop <= b:
            return before + start - a
        before += b - a
    return None


def _of_config(fields: Mapping[str, object]) -> str:
    kept = {name: value for name, value in fields.items() if name not in _OF_THE_FILE}
    return digest(json.dumps(kept, sort_keys=True, default=str))


def _hardware_text(hardware: Hardware) -> str:
    """Format hardware so that machines of one kind that were measured apart have two texts: their plans may differ."""
    return hardware.name if hardware.measured is None else f"{hardware.name} {digest(repr(hardware))}"


def _shown(value: object) -> str:
    text = "" if value is None or value == () else str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN // 2]}... {digest(text)}"
