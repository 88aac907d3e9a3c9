"""The tracing front end: from an unmodified Hugging Face model to one torch.fx graph, with parameters on meta."""

from autodist_fx.calls.call import OUTPUT_FLAGS
from autodist_fx.calls.input_spec import InputSpec
from autodist_fx.tracing.example_inputs import Sizes, input_facts
from autodist_fx.tracing.meta_model import class_for, empty_model, meta_copy
from autodist_fx.tracing.prompt_and_step import trace_phases
from autodist_fx.tracing.recurrent_states import PREFIX as STATE_PREFIX
from autodist_fx.tracing.recurrent_states import has_own_cache
from autodist_fx.tracing.traced_model import TracedModel, trace
from autodist_fx.tracing.versions.forwards import takes_cache

__all__ = [
    "OUTPUT_FLAGS",
    "STATE_PREFIX",
    "InputSpec",
    "Sizes",
    "TracedModel",
    "class_for",
    "empty_model",
    "has_own_cache",
    "input_facts",
    "meta_copy",
    "takes_cache",
    "trace",
    "trace_phases",
]
