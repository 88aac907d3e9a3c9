"""transformers' own pipeline parallelism (5.x): a naive one, one stage computes at a time."""

import torch
from transformers import AutoModelForCausalLM

from . import HuggingFaceContender


def build(path: str) -> HuggingFaceContender:
    """transformers starts the process group, cuts the layers evenly and loads each rank's."""
    from transformers.distributed import DistributedConfig  # not in 4.57

    split = DistributedConfig(pp_size=2)
    return HuggingFaceContender(
        AutoModelForCausalLM.from_pretrained(path, distributed_config=split, dtype=torch.float32)
    )
