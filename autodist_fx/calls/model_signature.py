"""`ModelSignature`: a model's class name, forward's parameters
and the config, which is all that reading a call needs."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class ModelSignature:
    """The part of a model that reading a call needs. An artifact stores this signature without the model itself."""

    model_class: str  # "LlamaForCausalLM"
    parameters: tuple[inspect.Parameter, ...]  # forward's, without self
    config: PretrainedConfig

    @property
    def argument_names(self) -> tuple[str, ...]:
        """Names of forward's parameters, without *args and **kwargs."""
        return tuple(p.name for p in self.parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))

    @property
    def takes_keywords(self) -> bool:
        """True if forward has *args or **kwargs."""
        return len(self.argument_names) < len(self.parameters)


def signature_of(model: PreTrainedModel) -> ModelSignature:
    """Read the signature of a model as it is now."""
    parameters = inspect.signature(model.forward).parameters.values()
    return ModelSignature(type(model).__name__, tuple(parameters), model.config)
