"""Builds a `Compilation` from a model or its config: traced, planned, emitted and verified."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import transformers
from transformers import PretrainedConfig, PreTrainedModel

from autodist_fx.calls.cache_names import CACHE_FIELD
from autodist_fx.compiler.compilation import Compilation
from autodist_fx.compiler.compile_options import CompileOptions
from autodist_fx.compiler.generation_traits import keeps_cache, step_arguments
from autodist_fx.compiler.peft import without_wrapper
from autodist_fx.compiler.source import TracingSource
from autodist_fx.compiler.torch_state import compiler_state
from autodist_fx.errors import AutodistError, TracingError
from autodist_fx.tracing import empty_model
from autodist_fx.tracing.versions.forwards import is_named_as_generate_does
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
    """Compile `model` into a compilation of class `kind`, planned for `request`; see autodist_fx.compile.

    `plan` was made earlier for the graph that is traced here. `request` is then the one that it was made for; it also
    holds for later variants of the model, which get plans of their own. Raises what autodist_fx.compile raises.
    """
    if options.train and options.use_cache:
        raise AutodistError("train=True is for whole sequences: leave use_cache out")
    model = without_wrapper(model)
    compiled = kind(TracingSource(model, request, options, plan), options)
    if options.verify:
        compiled.verify()
    return compiled


def compile_to_run(
    model: PreTrainedModel,
    kind: type[C],
    request: PlanRequest,
    options: CompileOptions,
    plan: PartitionPlan | None = None,
) -> tuple[C, str | None]:
    """Compile a model for ranks that run it: to generate, or where it does not, or has no graph with a cache, to be
    called. Returns the reason for the latter, too."""
    if not model.can_generate():
        return compile_model(model, kind, request, options, plan), f"{type(model).__name__} does not generate"
    try:
        return compile_for_generation(model, kind, request, options, plan), None
    except TracingError as error:
        return compile_model(model, kind, request, options, plan), str(error)


def compile_for_generation(
    model: PreTrainedModel | PretrainedConfig,
    kind: type[C],
    request: PlanRequest,
    options: CompileOptions,
    plan: PartitionPlan | None = None,
) -> C:
    """Compile a model with a KV cache, and logits of the last position only where its forward has an argument for that.
    Raises TracingError for a model that keeps no cache, or whose own forward calls it otherwise than transformers'
    generate."""
    shape = empty_model(model) if isinstance(model, PretrainedConfig) else model
    if not keeps_cache(shape):
        raise TracingError(
            f"{type(shape).__name__} keeps no cache of the tokens before, so it cannot generate over processes"
        )
    if not is_named_as_generate_does(type(shape)):
        raise TracingError(
            f"{type(shape).__name__}.forward calls its cache past_key_values, and the generate of transformers "
            f"{transformers.__version__} passes it as {CACHE_FIELD}: give forward an argument of that name"
        )
    return compile_model(shape, kind, request, as_used(shape, options), plan)


def as_used(model: PreTrainedModel, options: CompileOptions) -> CompileOptions:
    """Return `options` changed to trace a step of generating; those of a model that keeps no cache stay as they are."""
    if not keeps_cache(model):
        return options
    return replace(options, use_cache=True, concrete_args=tuple(step_arguments(model).items()))
