"""From a model, or its config, to a `Compilation`: traced, planned, emitted and verified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PretrainedConfig, PreTrainedModel

from autodist_fx.compiler.compilation import Compilation
from autodist_fx.compiler.generation_traits import generation_arguments, keeps_cache
from autodist_fx.compiler.peft import without_wrapper
from autodist_fx.compiler.variant import Variant
from autodist_fx.errors import AutodistError
from autodist_fx.tracing import empty_model, has_own_cache
from autodist_fx.tracing.meta_model import class_of
from cost_model.costs import hardware as presets
from cost_model.costs.hardware import Hardware
from cost_model.errors import PlanError
from cost_model.mesh import Mesh
from cost_model.partition_plan import PartitionPlan
from cost_model.request.devices import DeviceMap, Memory
from cost_model.request.plan_request import options_of, request_for

C = TypeVar("C", bound=Compilation)


def compile_model(
    model: PreTrainedModel | PretrainedConfig,
    kind: type[C],
    *,
    tp: int = 1,
    pp: int = 1,
    hardware: str | Hardware | None = None,
    objective: str = "shard",
    use_cache: bool = False,
    input_names: Sequence[str] | None = None,
    concrete_args: Mapping[str, object] | None = None,
    sizes: Mapping[str, int] | None = None,
    pin: Mapping[str, str] | None = None,
    cuts: Sequence[int | str] | None = None,
    max_memory: Memory | None = None,
    device_map: DeviceMap | None = None,
    plan: PartitionPlan | None = None,
    train: bool = False,
    verify: bool = True,
    dump_dir: str | Path | None = None,
) -> C:
    """A `kind` of compilation of `model`; see autodist_fx.compile for the rest."""
    if train and use_cache:
        raise AutodistError("train=True is for whole sequences: leave use_cache out")
    model = without_wrapper(model)
    fixed = {"pin": pin, "cuts": cuts, "max_memory": max_memory, "device_map": device_map}
    options: dict[str, Any] = {"objective": objective, **fixed}
    if plan is not None:
        given = [name for name, value in fixed.items() if value]
        if given:
            raise PlanError(f"a plan is used as it is, and {given[0]} would change it: leave out one of them")
        # What it was made for holds for other forms of the model, too, which have plans of their own.
        options = options_of(plan)
        hardware = hardware or options["hardware"]
    options["hardware"] = hardware_for(hardware, options["device_map"])
    request = request_for(Mesh(tp, pp) if plan is None else plan.mesh, sizes=sizes, **options)
    checks: dict[str, Any] = {
        "verify_programs": verify, "train": train, "dump_dir": dump_dir, "always": concrete_args or {},
    }  # fmt: skip
    if use_cache and has_own_cache(class_of(model)):
        prompt, step = Variant.make_phases(model, request, concrete_args, plan)
        compiled = kind(model, request, step, prompt=prompt, **checks)
    else:
        variant = Variant.make(model, request, use_cache, input_names, concrete_args, plan)
        compiled = kind(model, request, variant, **checks)
    if verify:
        compiled.verify()
    return compiled


def hardware_for(name: str | Hardware | None, device_map: DeviceMap | None = None) -> Hardware | None:
    """That of a name; for None what the device map says, else "generic" where CUDA is there, "cpu-gloo" where not."""
    if name is None and device_map:
        return None
    if name is None:
        name = "generic" if torch.cuda.is_available() else "cpu-gloo"
    return presets.hardware(name)


def compile_for_generation(model: PreTrainedModel | PretrainedConfig, kind: type[C], **options: Any) -> C:
    """`compile_model` with a KV cache, and logits of the last position only where the model offers that. Raises
    AutodistError for a model without a cache."""
    shape = empty_model(model) if isinstance(model, PretrainedConfig) else model
    if not keeps_cache(shape):
        raise AutodistError(
            f"{type(shape).__name__} keeps no cache of the tokens before, so it cannot generate over processes: split "
            f"it with adx.compile (or `autodist-fx compile`), and run the split with its simulate"
        )
    return compile_as_used(shape, kind, **options)


def compile_as_used(model: PreTrainedModel, kind: type[C], **options: Any) -> C:
    """`compile_model` for a step of generating; for a model that keeps no cache, for one forward of its main inputs."""
    if not keeps_cache(model):
        return compile_model(model, kind, **options)
    return compile_model(model, kind, use_cache=True, concrete_args=generation_arguments(model), **options)
