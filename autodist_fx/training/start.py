"""Starts an engine: from a model in memory or a checkpoint, with all ranks in this process or as one rank of many."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from autodist_fx.compiler.compile_options import CompileOptions
from autodist_fx.compiler.peft import without_wrapper
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.comm.join_options import JoinOptions
from autodist_fx.runtime.comm.process_group import fail_to_join, join
from autodist_fx.runtime.default_hardware import default_hardware
from autodist_fx.runtime.training.autograd.recompute import NONE, RECOMPUTE
from autodist_fx.runtime.training.optimizer import OptimizerFactory, SchedulerFactory
from autodist_fx.runtime.training.schedules import make_schedule
from autodist_fx.startup.facts import model_facts, request_facts
from autodist_fx.tracing import empty_model, meta_copy
from autodist_fx.tracing.hooks import backward_hooks_of
from autodist_fx.training.engine import Engine
from autodist_fx.training.hosts import Host, ProcessHost, ShareOptions, SimulatedHost
from autodist_fx.training.programs import TrainingPrograms
from autodist_fx.weights.checkpoint import open_source
from autodist_fx.weights.checkpoint_source import CheckpointSource
from autodist_fx.weights.dtype import wanted_dtype
from autodist_fx.weights.resolve import resolve
from autodist_fx.weights.sources.module_source import ModuleSource
from autodist_fx.weights.sources.source import WeightSource
from autodist_fx.weights.versions import named_as_in
from cost_model.mesh import Mesh
from cost_model.request.plan_options import PlanOptions
from cost_model.request.plan_request import PlanRequest


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """The options of `train` that do not concern the split; see autodist_fx.train."""

    dp: int
    pp: int
    schedule: str
    microbatches: int
    stages_per_rank: int | None
    optimizer: OptimizerFactory
    lr_scheduler: SchedulerFactory | None
    max_grad_norm: float | None
    seed: int = 0
    zero_stage: int = 0
    master_weights: bool = True
    recompute: str = NONE

    def __post_init__(self) -> None:
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise AutodistError(f"max_grad_norm is {self.max_grad_norm}: give a number above 0, or None not to clip")
        if not 0 <= self.seed < 2**63:
            raise AutodistError(f"seed is {self.seed}: give a number of 0 or more, less than 2**63")
        if isinstance(self.zero_stage, bool) or self.zero_stage not in (0, 1):
            raise AutodistError(
                f"zero_stage is {self.zero_stage!r}: give 1, and the replicas hold optimizer states once between them, "
                "or 0; gradients and weights each of them holds whole"
            )
        if self.recompute not in RECOMPUTE:
            way_out = "; ".join(f"{name!r}, to {what}" for name, what in RECOMPUTE.items())
            raise AutodistError(f"recompute is {self.recompute!r}: give {way_out}")
        if not callable(self.optimizer):
            raise AutodistError(
                f"optimizer is a {type(self.optimizer).__name__}: give a function from parameters to an optimizer, "
                "such as functools.partial(torch.optim.AdamW, lr=1e-4)"
            )

    @property
    def stages(self) -> int:
        """Pipeline stages of all ranks. Raises ScheduleError for numbers that do not go together."""
        return make_schedule(self.schedule, self.pp, self.microbatches, self.stages_per_rank).stages

    def facts(self) -> dict[str, object]:
        """Return what all ranks must be asked for alike."""
        return {
            "schedule": self.schedule,
            "microbatches": self.microbatches,
            "stages_per_rank": self.stages_per_rank,
            "max_grad_norm": self.max_grad_norm,
            "seed": self.seed,
            "zero_stage": self.zero_stage,
            "master_weights": self.master_weights,
            "recompute": self.recompute,
            "optimizer": _factory_text(self.optimizer),
            "lr_scheduler": "" if self.lr_scheduler is None else _factory_text(self.lr_scheduler),
        }


@dataclass(frozen=True, slots=True)
class Origin:
    """The model to be trained: its structure, on meta and in training mode, and where its weights are."""

    model: PreTrainedModel
    open_weights: Callable[[], WeightSource]


def simulated(
    model: object,
    dtype: torch.dtype | str | None,
    wanted: PlanOptions,
    options: TrainOptions,
    compiling: CompileOptions,
) -> Engine:
    """Return an engine with all ranks in this process."""
    request = wanted.resolve(default_hardware())
    mesh = Mesh(request.mesh.tp, options.pp, options.dp)
    origin = _origin(model, dtype)
    return _engine(SimulatedHost(_share(origin, mesh, options)), origin, request, wanted, options, compiling)


def distributed(
    model: object,
    dtype: torch.dtype | str | None,
    wanted: PlanOptions,
    options: TrainOptions,
    compiling: CompileOptions,
    joining: JoinOptions,
) -> Engine:
    """Return an engine of which this process is one rank."""
    try:
        request = wanted.resolve(default_hardware())
        mesh = Mesh(request.mesh.tp, options.pp, options.dp)
    except AutodistError as error:
        fail_to_join(error, joining)
    facts = request_facts("train", request, wanted.plan, verify=compiling.verify, dtype=dtype, **options.facts())
    joined = join(mesh, joining, facts)

    def opened() -> tuple[Origin, dict[str, str]]:
        origin = _origin(model, dtype)
        return origin, model_facts(origin.model, None, origin.open_weights)

    origin = joined.together(opened)
    return _engine(ProcessHost(joined, _share(origin, mesh, options)), origin, request, wanted, options, compiling)


def _origin(model: object, dtype: torch.dtype | str | None) -> Origin:
    """Return what is trained. Raises AutodistError for a model without weights, CheckpointError for none."""
    if isinstance(model, (str, Path, CheckpointSource)):
        checkpoint = resolve(model if isinstance(model, CheckpointSource) else CheckpointSource(model))
        shape = empty_model(checkpoint.config, wanted_dtype(dtype, checkpoint.config)).train()
        if shape.can_generate():
            shape.generation_config = checkpoint.generation_config
        return Origin(shape, lambda: named_as_in(shape, open_source(checkpoint)))
    inside = without_wrapper(model)
    if dtype is not None:
        raise AutodistError("dtype is of a checkpoint that is loaded: convert a model in memory by .to(dtype)")
    if isinstance(inside, PretrainedConfig) or any(p.is_meta for p in inside.parameters()):
        raise AutodistError("train needs weights: give a model that has them, or the path of a checkpoint")
    _refuse_hooks(inside)
    return Origin(meta_copy(inside).train(), lambda: ModuleSource(inside))


def _refuse_hooks(model: PreTrainedModel) -> None:
    """Raise AutodistError for hooks that see or change gradients: a rank has pieces of those."""
    found = [str(hook) for hook in backward_hooks_of(model)]
    found += [f"a hook of {name}'s gradient" for name, p in model.named_parameters() if p._backward_hooks]
    if found:
        raise AutodistError(f"{found[0]} is called while a model is trained, and ranks train without it: remove it")


def _share(origin: Origin, mesh: Mesh, options: TrainOptions) -> ShareOptions:
    return ShareOptions(
        mesh, origin.model, origin.open_weights, options.optimizer, options.lr_scheduler, options.max_grad_norm,
        options.zero_stage, options.master_weights, options.recompute,
    )  # fmt: skip


def _engine(
    host: Host,
    origin: Origin,
    request: PlanRequest,
    wanted: PlanOptions,
    options: TrainOptions,
    compiling: CompileOptions,
) -> Engine:
    return Engine(
        host,
        TrainingPrograms(origin.model, request, wanted.plan, compiling),
        schedule=options.schedule,
        microbatches=options.microbatches,
        stages_per_rank=options.stages_per_rank,
        verify=compiling.verify,
        seed=options.seed,
    )


def _factory_text(factory: object) -> str:
    """Format a factory so that alike ones have the same text in every process."""
    if isinstance(factory, functools.partial):
        given = [*map(repr, factory.args), *(f"{name}={value!r}" for name, value in sorted(factory.keywords.items()))]
        plain = [text for text in given if " at 0x" not in text]
        return f"{_factory_text(factory.func)}({', '.join(plain)})"
    return str(getattr(factory, "__qualname__", type(factory).__qualname__))
