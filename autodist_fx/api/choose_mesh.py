"""`choose_mesh`: picks tp and pp for a number of devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PretrainedConfig, PreTrainedModel

from autodist_fx.compiler.compile_options import CompileOptions
from autodist_fx.compiler.examples import phases_once, planned_graph, traced_once
from autodist_fx.compiler.peft import without_wrapper
from autodist_fx.runtime.default_hardware import default_hardware
from autodist_fx.tracing import has_own_cache
from autodist_fx.tracing.meta_model import class_of, config_of
from cost_model.costs.hardware import Hardware
from cost_model.request.devices import Memory
from cost_model.request.plan_options import PlanOptions
from cost_model.search import mesh_choice
from cost_model.search.mesh_choice import MeshChoice
from passes.op_graph.build import fingerprint


def choose_mesh(
    model: PreTrainedModel | PretrainedConfig,
    devices: int,
    *,
    hardware: str | Hardware | None = None,
    objective: str = "latency",
    sequences: int | None = None,
    sizes: Mapping[str, int] | None = None,
    pin: Mapping[str, str] | None = None,
    cuts: Sequence[int | str] | None = None,
    max_memory: Memory | None = None,
    strict: bool = False,
    use_cache: bool = True,
    input_names: Sequence[str] | None = None,
    concrete_args: Mapping[str, object] | None = None,
) -> MeshChoice:
    """Plan the model on every mesh that `devices` devices can form, and rank the plans; the model is traced once.

    model: a PreTrainedModel with weights or on meta, or a config; weights are never read.
    devices: number of devices, all alike. A mesh takes all of them, or a divisor of them: for throughput several copies
        of the mesh then work side by side.
    objective: "latency" (seconds of one forward; with use_cache of one token), "throughput" (tokens/s under load),
        "memory" (bytes on the fullest rank).
    sequences: number in flight over all devices, for throughput; None: as many as each mesh has memory for, at most 256
        per device.
    sizes, pin, cuts, use_cache, input_names, concrete_args: as in `compile`. max_memory: one amount, per device.
    strict: leaves out meshes whose plan has ops without a sharding rule.

    `print` of the result shows all meshes; `.best.plan` goes into `compile(model, plan=...)`, and `.best.mesh` has tp
    and pp. Raises NoPlanFits where no mesh fits; MeshError, PlanError, TracingError: all are AutodistError.
    """
    wanted = PlanOptions.from_keywords(
        hardware=hardware, objective=objective, sizes=sizes, pin=pin, cuts=cuts, max_memory=max_memory, strict=strict
    )
    options = CompileOptions.from_keywords(use_cache=use_cache, input_names=input_names, concrete_args=concrete_args)
    return choose_mesh_for(model, devices, wanted, options, sequences)


def choose_mesh_for(
    model: PreTrainedModel | PretrainedConfig,
    devices: int,
    wanted: PlanOptions,
    options: CompileOptions,
    sequences: int | None,
) -> MeshChoice:
    """Choose a mesh for options that were read already; see `choose_mesh`."""
    model, request, fixed = without_wrapper(model), wanted.resolve(default_hardware()), dict(options.concrete_args)
    if options.use_cache and has_own_cache(class_of(model), config_of(model)):
        _, traced = phases_once(model, fixed)
    else:
        traced, _ = traced_once(model, options.use_cache, options.input_names, fixed)
    graph = planned_graph(traced)
    return mesh_choice.choose_mesh(
        graph,
        request,
        devices,
        model=traced.model_class,
        fingerprint=fingerprint(graph),
        sequences=sequences,
    )
