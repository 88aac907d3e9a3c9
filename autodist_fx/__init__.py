"""Automatic tensor and pipeline parallelism for Hugging Face models, as a torch.fx compiler pass."""

from autodist_fx.compiled import CompiledModel, compile
from autodist_fx.errors import AutodistError
from cost_model.plan import PartitionPlan

__all__ = ["AutodistError", "CompiledModel", "PartitionPlan", "compile"]
