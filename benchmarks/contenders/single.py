"""The reference: the unmodified transformers model in one process."""

import torch
from transformers import AutoModelForCausalLM

from . import HuggingFaceContender


def build(path: str) -> HuggingFaceContender:
    """Load it whole."""
    return HuggingFaceContender(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
