"""The tracing front end: from an unmodified Hugging Face model to one torch.fx graph, with parameters on meta."""

from autodist_fx.tracing.example_inputs import Sizes
from autodist_fx.tracing.meta_model import empty_model, meta_copy
from autodist_fx.tracing.traced_model import TracedModel, trace

__all__ = ["Sizes", "TracedModel", "empty_model", "meta_copy", "trace"]
