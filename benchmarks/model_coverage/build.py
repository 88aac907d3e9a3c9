"""A tiny model of a type: every parameter random, in eval mode, in float64."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from model_coverage.overrides import OVERRIDES, made_by_hand
from model_coverage.shrink import IMAGE, tiny_config

SEED = 0


class CannotBuild(Exception):
    """A type of which no model can be built here; the message says why."""


def config_of(model_class: type[PreTrainedModel], task: str) -> PretrainedConfig:
    """A tiny config of the class that the model wants (of a type with several parts, its text part, say)."""
    model_type = model_class.config_class.model_type
    overrides: dict[str, Any] = {}
    for key in (task, model_type, f"{task}:{model_type}"):
        overrides.update(OVERRIDES.get(key, {}))
    return made_by_hand(model_type) or tiny_config(model_class.config_class, overrides)


def build(task: str, class_name: str, dtype: torch.dtype = torch.float64, gain: float = 1.0) -> PreTrainedModel:
    """The model of that class, random and in eval mode; `gain` as in `randomise`. Errors: CannotBuild."""
    model_class = getattr(transformers, class_name, None)
    if model_class is None:
        raise CannotBuild(f"transformers {transformers.__version__} has no class {class_name}")
    torch.manual_seed(SEED)
    try:
        config = config_of(model_class, task)
        if task == "image-classification" and not any(hasattr(config, n) for n in ("image_size", "vision_config")):
            config.image_size = 2 * IMAGE  # where tracing looks; 224 x 224 would take its time
        model = model_class(config)
    except ImportError as error:
        raise CannotBuild(f"needs another package: {_first_line(error)}") from error
    except Exception as error:
        raise CannotBuild(f"{type(error).__name__}: {_first_line(error)}") from error
    model = model.to(dtype)
    if hasattr(model, "set_experts_implementation"):  # transformers 5: its default knows no float64
        model.set_experts_implementation("eager")
    randomise(model, gain=gain)
    return model.eval()  # last: some keep what they compute of their parameters when they are told so


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@torch.no_grad()
def randomise(model: nn.Module, seed: int = SEED, gain: float = 1.0) -> None:
    """Random numbers in every parameter and in the statistics of batch norms; matrices are `gain` times as large as
    keeps the size of what they multiply.

    transformers starts biases at 0 and norm scales at 1: a bias added twice, or a scale applied to the wrong rows,
    would give the right result. None is so large that softmaxes turn hard.
    """
    generator = torch.Generator().manual_seed(seed)
    convolutions = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.modules.conv._ConvNd) and isinstance(module.weight, nn.Parameter)
    }
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if id(parameter) in convolutions:
            value = noise * max(parameter[0].numel(), 1) ** -0.5
        elif parameter.dim() > 1:
            value = noise * gain * max(parameter.shape[-1], 1) ** -0.5
        else:
            value = noise * 0.3 + (1.0 if name.endswith("weight") else 0.0)  # a norm's scale, or a bias
        parameter.copy_(value)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator, dtype=torch.float64) * 0.1)
        elif name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=torch.float64) + 0.5)


__all__ = ["CannotBuild", "build", "config_of", "randomise"]
