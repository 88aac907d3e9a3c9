"""transformers' own tensor parallelism, by the plan that the model class brings along."""

import torch
from transformers import AutoModelForCausalLM

from . import HuggingFaceContender


def build(path: str) -> HuggingFaceContender:
    """transformers starts the process group and slices the weights itself."""
    return HuggingFaceContender(AutoModelForCausalLM.from_pretrained(path, tp_plan="auto", dtype=torch.float32))
