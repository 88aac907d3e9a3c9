"""`choose_training`: picks mesh, microbatches, schedule, recomputation and ZeRO-1 to train a model with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import PretrainedConfig, PreTrainedModel

from autodist_fx.calls.input_shapes import label_specs
from autodist_fx.compiler.examples import planned_graph, traced_once
from autodist_fx.compiler.peft import without_wrapper
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.default_hardware import default_hardware
from autodist_fx.runtime.training.schedules import make_schedule
from autodist_fx.tracing import empty_model, input_facts, meta_copy
from autodist_fx.tracing.example_inputs import default_inputs
from cost_model.costs.hardware import Hardware
from cost_model.request.devices import Memory
from cost_model.request.plan_options import PlanOptions
from cost_model.training import choice
from cost_model.training.choice import TrainingChoice, TrainingWishes
from cost_model.training.estimate import ADAM_STATES, ADAM_STATES_WITH_MASTERS
from passes.op_graph.build import fingerprint


def choose_training(
    model: PreTrainedModel | PretrainedConfig,
    devices: int,
    *,
    global_batch: int,
    tp: int | None = None,
    pp: int | None = None,
    dp: int | None = None,
    microbatches: int | None = None,
    schedule: str | None = None,
    recompute: bool | None = None,
    zero: bool | None = None,
    masters: bool | None = None,
    hardware: str | Hardware | None = None,
    objective: str = "shard",
    sizes: Mapping[str, int] | None = None,
    pin: Mapping[str, str] | None = None,
    max_memory: Memory | None = None,
    strict: bool = False,
    input_names: Sequence[str] | None = None,
) -> TrainingChoice:
    """Predict a training step with AdamW on every mesh that `devices` devices can form, and rank them by seconds.

    model: a PreTrainedModel with weights or on meta, or a config; weights are never read.
    devices: number of devices, all alike, all of them used. global_batch: sequences of a step, over all of them.
    tp, pp, dp, microbatches, schedule, recompute, zero: what is given is kept; None: chosen.
    masters: float32 copies of 16-bit weights beside the optimizer's states; None: where the model's dtype has 16 bits.
    hardware, objective, pin, strict, input_names: as in `compile`; cuts are the search's, another on each mesh.
    sizes: lengths to predict at, {"S": 2048}; B is chosen. max_memory: one amount, per device; without it 90 % of it.

    `print` of the result shows all meshes; `.best.setup` has what `train` is to be called with, `.best.timeline` its
    simulated schedule, `.best.plan` the plan of one replica.
    Raises NoPlanFits where no mesh fits; MeshError, PlanError, ScheduleError, TracingError: all are AutodistError.
    """
    wanted = PlanOptions.from_keywords(
        hardware=hardware, objective=objective, sizes=sizes, pin=pin, max_memory=max_memory, strict=strict
    )
    wishes = TrainingWishes(devices, global_batch, tp, pp, dp, microbatches, schedule, recompute, zero)
    return choose_training_for(model, wanted, wishes, masters=masters, input_names=input_names)


def choose_training_for(
    model: PreTrainedModel | PretrainedConfig,
    wanted: PlanOptions,
    wishes: TrainingWishes,
    *,
    masters: bool | None = None,
    input_names: Sequence[str] | None = None,
) -> TrainingChoice:
    """Choose how to train for options that were read already; see `choose_training`."""
    inside = without_wrapper(model)
    shape = (empty_model(inside) if isinstance(inside, PretrainedConfig) else meta_copy(inside)).train()
    names = tuple(input_names or (*default_inputs(shape, use_cache=False), "labels"))
    if "labels" not in names:
        raise AutodistError("a step of training needs a loss: give input_names with what it is computed from (labels)")
    traced, _ = traced_once(shape, False, names, {}, specs=label_specs(names, input_facts(shape)) or None)
    graph = planned_graph(traced, trains=True)
    return choice.choose_training(
        graph,
        wanted.resolve(default_hardware()),
        _with_states(wishes, shape.dtype, masters),
        make_schedule,
        model=traced.model_class,
        fingerprint=fingerprint(graph),
    )
