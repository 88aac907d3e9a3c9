"""Lets accelerate take a rank for the only process.

All ranks of a mesh are one device to transformers' Trainer: each sees all data, in one order, and the engine deals rows
to replicas. Under torchrun, accelerate would deal the data to the processes itself, and wrap the model.
"""

from __future__ import annotations

import os
from unittest import mock

from transformers import TrainingArguments

# by which accelerate.state.PartialState finds other processes
_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE",
    "ACCELERATE_USE_CPU_DISTRIBUTED",
)  # fmt: skip


def as_one_process(args: TrainingArguments) -> None:
    """Make `args`, and accelerate's state of this process, those of one that is alone. The process group that
    TrainingArguments have started stays, and is what the engine's ranks meet in."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    if args.world_size == 1:
        return
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    alone = {name: value for name, value in os.environ.items() if name not in _VARIABLES}
    with mock.patch.dict(os.environ, alone, clear=True):
        args.distributed_state = PartialState(cpu=args.use_cpu)
    args.local_rank = -1
