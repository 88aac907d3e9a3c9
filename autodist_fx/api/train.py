"""`train`: makes the engine that trains a model over a mesh."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from autodist_fx.compiler.compile_options import CompileOptions
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.comm.join_options import DEFAULT_TIMEOUT_SECONDS, JoinOptions
from autodist_fx.runtime.comm.process_group import fail_to_join
from autodist_fx.runtime.training.optimizer import OptimizerFactory, SchedulerFactory
from autodist_fx.training.engine import Engine
from autodist_fx.training.start import TrainOptions, distributed, simulated
from cost_model.costs.hardware import Hardware
from cost_model.partition_plan import PartitionPlan
from cost_model.request.devices import DeviceMap, Memory
from cost_model.request.plan_options import PlanOptions

_LEARNING_RATE = 5e-5  # of transformers' TrainingArguments


def train(
    model: PreTrainedModel | str | Path,
    *,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    schedule: str = "1f1b",
    microbatches: int | None = None,
    stages_per_rank: int | None = None,
    optimizer: OptimizerFactory | None = None,
    lr_scheduler: SchedulerFactory | None = None,
    max_grad_norm: float | None = None,
    zero_stage: int = 0,
    master_weights: bool = True,
    recompute: str = "none",
    seed: int = 0,
    simulate: bool = False,
    dtype: torch.dtype | str | None = None,
    hardware: str | Hardware | None = None,
    objective: str = "shard",
    pin: Mapping[str, str] | None = None,
    cuts: Sequence[int | str] | None = None,
    max_memory: Memory | None = None,
    device_map: DeviceMap | None = None,
    plan: PartitionPlan | None = None,
    strict: bool = False,
    verify: bool = True,
    dump_dir: str | Path | None = None,
    device: str | torch.device | None = None,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    rank: int | None = None,
    world_size: int | None = None,
    master_addr: str | None = None,
    master_port: int | None = None,
) -> Engine:
    """Split a model over `pp * dp * tp` ranks to train it; `engine.step(batch)` then trains.

    model: a PreTrainedModel with weights, which stays as it is (a PeftModel stands for the model inside it: its
        adapters are trained, and what they freeze is not); or a checkpoint, as from_pretrained names it. Parameters
        that do not require gradients stay as they are. It is trained in training mode, whatever mode it is in.
    tp, pp, dp: ranks that share each tensor; ranks of the pipeline; replicas, each of which takes rows of its own.
        Global rank = (pp rank * dp + dp rank) * tp + tp rank.
    schedule: the order of forward and backward passes, by torch.distributed.pipelining's names: "1f1b", "gpipe",
        "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble".
    microbatches: parts that each replica's rows of a batch are cut into; by default one for each pipeline rank.
    stages_per_rank: pipeline stages of each rank; None: one for 1f1b and gpipe, else two.
    optimizer: a function from [(name, parameter), ...], a rank's slices of the model's, to a torch.optim.Optimizer
        that steps each element by itself: functools.partial(torch.optim.AdamW, lr=1e-4, fused=True). By default AdamW
        (fused) with a learning rate of 5e-5. A tied tensor has one name; two stages that hold it both step it, alike.
    lr_scheduler: a function from that optimizer to its torch.optim.lr_scheduler, stepped after each step.
    max_grad_norm: gradients are scaled so that their norm, of the whole model, is at most this; None: they are not.
    zero_stage: 1: each replica keeps optimizer states (and float32 weights) of its part of the parameters alone, steps
        that part, and gets the rest from the others, as DeepSpeed's ZeRO stage 1 does; 0: each keeps all.
    master_weights: parameters in bfloat16 or float16 are stepped as float32 copies, which they are rounded from after
        each step, and their gradients are added up in float32; False: both in their own dtype, as in one process.
    recompute: "layers": what the backward pass needs of a layer (an element of the outermost nn.ModuleList) is computed
        again when it comes there, from the layer's inputs, which alone are kept; "none": all that it needs is kept;
        "auto": "layers" where a device is predicted to be too small otherwise (max_memory, or 90 % of the hardware's).
    seed: of the random numbers that training mode draws (dropout): with the step and a row's place in the batch it
        decides them, on any mesh and for any number of microbatches alike. torch's own generators are left alone.
    simulate: run all ranks in this process, a thread each; else this process is one of the ranks (torchrun).
    dtype: of a checkpoint's weights; None: the checkpoint's.
    hardware, objective, pin, cuts, max_memory, device_map, plan, strict: as in `compile`; plans are of one replica.
    verify: prove the programs of all ranks before any runs. dump_dir: as in `compile`.
    device, timeout, rank, world_size, master_addr, master_port: as in `from_pretrained`.

    The model is split at the first step, for the inputs that it gets. Raises AutodistError, in one line, on every rank.
    """
    joining = JoinOptions(device, rank, world_size, master_addr, master_port, timeout)
    compiling = CompileOptions(verify=verify, dump_dir=dump_dir)
    try:
        options = TrainOptions(
            dp=dp, pp=pp, schedule=schedule, microbatches=pp if microbatches is None else microbatches,
            stages_per_rank=stages_per_rank,
            optimizer=optimizer or functools.partial(torch.optim.AdamW, lr=_LEARNING_RATE, fused=True),
            lr_scheduler=lr_scheduler, max_grad_norm=max_grad_norm, seed=seed,
            zero_stage=zero_stage, master_weights=master_weights, recompute=recompute,
        )  # fmt: skip
        wanted = PlanOptions.from_keywords(
            tp=tp, pp=options.stages, hardware=hardware, objective=objective, pin=pin, cuts=cuts,
            max_memory=max_memory, device_map=device_map, plan=plan, strict=strict,
        )  # fmt: skip
    except (AutodistError, TypeError) as error:
        if simulate:
            raise
        fail_to_join(error, joining)
    if simulate:
        return simulated(model, dtype, wanted, options, compiling)
    return distributed(model, dtype, wanted, options, compiling, joining)
