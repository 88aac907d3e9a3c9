"""Automatic tensor and pipeline parallelism for Hugging Face models, as a torch.fx compiler pass."""

from autodist_fx.compiled import CompiledModel, compile
from autodist_fx.errors import AutodistError
from autodist_fx.pretrained import from_pretrained
from autodist_fx.runtime.generation import DistributedCausalLM
from cost_model.plan import PartitionPlan

__all__ = ["AutodistError", "CompiledModel", "DistributedCausalLM", "PartitionPlan", "compile", "from_pretrained"]
