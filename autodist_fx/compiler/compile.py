"""From a model, or its config, to a `Compilation`: traced, planned, emitted and verified."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from transformers import PretrainedConfig, PreTrainedModel

from autodist_fx.compiler.compilation import Compilation
from autodist_fx.compiler.compile_options import CompileOptions
from autodist_fx.compiler.generation_traits import keeps_cache, last_logits_only
from autodist_fx.compiler.peft import without_wrapper
from autodist_fx.compiler.source import TracingSource
from autodist_fx.compiler.torch_state import compiler_state
from autodist_fx.errors import AutodistError
from autodist_fx.tracing import empty_model
from cost_model.partition_plan import PartitionPlan
from cost_model.request.plan_request import PlanRequest

C = TypeVar("C", bound=Compilation)


@compiler_state()
def compile_model(
    model: PreTrainedModel | PretrainedConfig,
    kind: type[C],
    request: PlanRequest,
    options: CompileOptions,
    plan: PartitionPlan | None = None,
) -> C:
    """A `kind` of compilation of `model`, planned for `request`; see autodist_fx.compile.

    `plan` was made earlier for what is traced here. `request` is then what it was made for, which holds for other
    forms of the model, too: they get plans of their own.
    """
    if options.train and options.use_cache:
        raise AutodistError("train=True is for whole sequences: leave use_cache out")
    model = without_wrapper(model)
    compiled = kind(TracingSource(model, request, options, plan), options)
    if options.verify:
        compiled.verify()
    return compiled


def compile_for_generation(
    model: PreTrainedModel | PretrainedConfig,
    kind: type[C],
    request: PlanRequest,
    options: CompileOptions,
    plan: PartitionPlan | None = None,
) -> C:
    """`compile_model` with a KV cache, and logits of the last position only where the model offers that. Raises
    AutodistError for a model without a cache."""
    shape = empty_model(model) if isinstance(model, PretrainedConfig) else model
    if not keeps_cache(shape):
        raise AutodistError(
            f"{type(shape).__name__} keeps no cache of the tokens before, so it cannot generate over processes: split "
            f"it with adx.compile (or `autodist-fx compile`), and run the split with its simulate"
        )
    return compile_model(shape, kind, request, as_used(shape, options), plan)


def as_used(model: PreTrainedModel, options: CompileOptions) -> CompileOptions:
    """Options that trace a step of generating; of a model that keeps no cache, one forward of its main inputs."""
    if not keeps_cache(model):
        return options
    return replace(options, use_cache=True, concrete_args=tuple(last_logits_only(model).items()))
