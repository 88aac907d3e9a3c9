"""`ModelSignature`: a model's class name, the arguments of its forward and its config; all that a call asks of it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class ModelSignature:
    """A model as a call sees it. The model itself need not be there: an artifact keeps its signature alone."""

    model_class: str  # "LlamaForCausalLM"
    parameters: tuple[inspect.Parameter, ...]  # of forward, without self
    config: PretrainedConfig

    @property
    def argument_names(self) -> tuple[str, ...]:
        """The names that forward has for its arguments, without *args and **kwargs."""
        return tuple(p.name for p in self.parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))

    @property
    def takes_keywords(self) -> bool:
        """Whether forward takes arguments that it has no names for."""
        return len(self.argument_names) < len(self.parameters)


def signature_of(model: PreTrainedModel) -> ModelSignature:
    """Read the signature of a model as it stands."""
    parameters = inspect.signature(model.forward).parameters.values()
    return ModelSignature(type(model).__name__, tuple(parameters), model.config)
