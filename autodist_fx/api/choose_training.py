"""`choose_training`: picks mesh, microbatches, schedule, recomputation and ZeRO-1 to train a model with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from transformers import PretrainedConfig, PreTrainedModel

from autodist_fx.calls.input_shapes import answers_once
from autodist_fx.calls.input_spec import InputSpec
from autodist_fx.compiler.examples import planned_graph, traced_once
from autodist_fx.compiler.peft import without_wrapper
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.default_hardware import default_hardware
from autodist_fx.runtime.training.optimizer import wants_master
from autodist_fx.runtime.training.schedules import make_schedule
from autodist_fx.tracing import empty_model, meta_copy
from autodist_fx.tracing.example_inputs import default_inputs
from cost_model.costs.hardware import Hardware
from cost_model.request.devices import Memory
from cost_model.request.plan_options import PlanOptions
from cost_model.training import choice
from cost_model.training.choice import TrainingChoice, TrainingWishes
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
    recompute: str | None = None,
    zero_stage: int | None = None,
    master_weights: bool = True,
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
    tp, pp, dp, microbatches, schedule, recompute, zero_stage, master_weights: as in `train`; those of None are chosen.
    hardware, objective, pin, strict, input_names: as in `compile`; cuts are the search's, another on each mesh.
    sizes: lengths to predict at, {"S": 2048}; B is chosen. max_memory: one amount, per device; without it 90 % of it.

    `print` of the result shows all meshes; `.best.setup` has what `train` is to be called with, `.best.timeline` its
    simulated schedule, `.best.plan` the plan of one replica.
    Raises NoPlanFits where no mesh fits; MeshError, PlanError, ScheduleError, TracingError: all are AutodistError.
    """
    wanted = PlanOptions.from_keywords(
        hardware=hardware, objective=objective, sizes=sizes, pin=pin, max_memory=max_memory, strict=strict
    )
    wishes = TrainingWishes(devices, global_batch, tp, pp, dp, microbatches, schedule, recompute, zero_stage)
    return choose_training_for(model, wanted, wishes, master_weights=master_weights, input_names=input_names)


def choose_training_for(
    model: PreTrainedModel | PretrainedConfig,
    wanted: PlanOptions,
    wishes: TrainingWishes,
    *,
    master_weights: bool = True,
    input_names: Sequence[str] | None = None,
) -> TrainingChoice:
    """Choose how to train for options that were read already; see `choose_training`."""
    inside = without_wrapper(model)
    shape = (empty_model(inside) if isinstance(inside, PretrainedConfig) else meta_copy(inside)).train()
    names = tuple(input_names or (*default_inputs(shape, use_cache=False), "labels"))
    if "labels" not in names:
        raise AutodistError("a step of training needs a loss: give input_names with what it is computed from (labels)")
    specs = {"labels": InputSpec(("B",), torch.long)} if answers_once(type(shape).__name__) else None
    traced, _ = traced_once(shape, False, names, {}, specs=specs)
    graph = planned_graph(traced, trains=True)
    has_masters = master_weights and wants_master(shape.dtype)
    return choice.choose_training(
        graph,
        wanted.resolve(default_hardware()),
        replace(wishes, has_masters=has_masters),
        make_schedule,
        model=traced.model_class,
        fingerprint=fingerprint(graph),
    )
