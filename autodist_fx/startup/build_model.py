"""Builds a rank's model of its programs: the one place that chooses its runtime class.

Programs come from a compilation (from_checkpoint.py) or from an artifact's files (from_artifact.py). Both say by a
`RankPrograms` which variants there are, and by `RankParts` what a model is made of besides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig

from autodist_fx.calls.call import Call
from autodist_fx.calls.model_signature import ModelSignature
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.device.decode_graphs import DecodeGraphs
from autodist_fx.runtime.distributed_model import DistributedModel
from autodist_fx.runtime.generation.call_programs import CallProgram
from autodist_fx.runtime.generation.causal_lm import DistributedCausalLM
from autodist_fx.runtime.generation.collective_call import CallCommunicator
from autodist_fx.runtime.generation.guarded_programs import GuardedPrograms
from autodist_fx.runtime.generation.recurrent_lm import DistributedOwnCacheLM, Phase, check_reads, handovers
from autodist_fx.runtime.generation.seq2seq_lm import DistributedSeq2SeqLM, seq2seq_class
from autodist_fx.runtime.generation.step_runner import RunnerParts, StepRunner
from autodist_fx.runtime.microbatches.forecast import StageSeconds
from autodist_fx.weights.load import LoadReport
from cost_model.partition_plan import PartitionPlan
from passes.program.rank_program import RankProgram

V = TypeVar("V")
T = TypeVar("T")
D = TypeVar("D", bound=StepRunner)
RankModel = DistributedCausalLM | DistributedModel


class RankPrograms(Protocol[V]):
    """One rank's programs, by variant: a traced graph of the model, compiled (Variant) or on the disk
    (SavedVariant)."""

    @property
    def step(self) -> V:
        """Return the variant that generates tokens; in a model that does not, the one for its usual call."""

    @property
    def prompt(self) -> V | None:
        """Return the variant that runs before the steps, in a model with a cache of its own; None for all others."""

    def encoder_of(self, variant: V) -> V | None:
        """Return the variant that fills the cache which `variant` reads, in a model with an encoder and a decoder;
        else None."""

    def program(self, variant: V) -> RankProgram:
        """Return this rank's program, with its weights."""

    def of_column(self, variant: V) -> list[RankProgram]:
        """Return the programs of the ranks at this one's place in the tp groups of all stages, in order; without
        weights."""

    def guarded(self, first: V, run: Callable[[V], T]) -> GuardedPrograms[T]:
        """Return what `run` makes of `first` and, where its guards do not hold, of its like for other sizes."""

    @property
    def signature(self) -> ModelSignature:
        """Return the signature of calls; see CallPrograms."""

    @property
    def positions_of_values(self) -> bool:
        """Return whether the model counts positions that a call leaves out; see CallPrograms."""

    def completed(self, call: Call) -> Call:
        """Return the call with the positions that the model counts; see CallPrograms."""

    def program_for(self, call: Call) -> CallProgram:
        """Return the program for a call, with the weights of the step's program, where both hold them alike; see
        CallPrograms."""

    @property
    def step_seconds(self) -> StageSeconds:
        """Return what predicts the seconds of each stage in a step that generates."""

    def is_usual(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Return whether what the step's graph assumes of values holds; see CallPrograms."""

    def program_for_step(self, tensors: Mapping[str, torch.Tensor], past: int) -> RankProgram:
        """Return the program for a step with inputs that no usual step has; see CallPrograms."""


@dataclass(frozen=True, slots=True)
class RankParts:
    """The parts that one rank's model is made of.

    `main_input_name`: the model's first input. `skeleton`: the model on meta, where its family
    has a generate of its own, which asks it for sizes, or prepares the inputs of a decoder's steps by itself; None
    where transformers' own methods serve. `no_generate` says why a model whose programs have no cache has none; ""
    where that is not known. `cuda_graphs`: steps that generate are captured.
    """

    programs: RankPrograms[Any]
    communicator: CallCommunicator
    device: torch.device
    config: PretrainedConfig
    generation_config: GenerationConfig | None
    plan: PartitionPlan
    load_report: LoadReport
    positions_follow_mask: bool
    main_input_name: str = "input_ids"
    skeleton: nn.Module | None = None
    no_generate: str = ""
    cuda_graphs: bool = False


def build_model(parts: RankParts) -> RankModel:
    """Return the model of one rank, ready to generate: with an encoder, with a cache of its own, or with a KV cache;
    or to be called alone."""
    programs = parts.programs
    kind = _kind(programs)
    if parts.cuda_graphs and kind.model is not _causal_model:
        raise AutodistError(
            f"cuda_graphs captures the steps of a decoder with a KV cache, and {programs.signature.model_class} is "
            "none: leave it out"
        )
    whole = getattr(parts.communicator, "is_captured", False)
    runner = RunnerParts(
        program=programs.program(programs.step),
        communicator=parts.communicator,
        config=parts.config,
        generation_config=parts.generation_config,
        device=parts.device,
        plan=parts.plan,
        load_report=parts.load_report,
        positions_follow_mask=parts.positions_follow_mask,
        call_programs=programs,
        graphs=DecodeGraphs(parts.device, whole=whole) if parts.cuda_graphs else None,
    )
    return kind.model(parts, runner)


def generating_programs(programs: RankPrograms[V]) -> GuardedPrograms[Any]:
    """Return the programs that a rank runs to generate, by sizes: those of encoder and decoder; that of a prompt,
    and what is handed over after it, in a model with a cache of its own; or that of a step."""
    return _kind(programs).programs(programs)


class _Kind(NamedTuple):
    """A way to generate: the programs that a rank runs for it, and the model that runs them."""

    programs: Callable[[RankPrograms[Any]], GuardedPrograms[Any]]
    model: Callable[[RankParts, RunnerParts], RankModel]


def _kind(programs: RankPrograms[Any]) -> _Kind:
    """Choose how a rank generates: the one place that does."""
    if not programs.step.made_for.use_cache:
        return _Kind(_step_programs, _called_model)
    if programs.encoder_of(programs.step) is not None:
        return _Kind(_seq2seq_programs, _seq2seq_model)
    if programs.prompt is not None:
        return _Kind(_prompt_programs, _own_cache_model)
    return _Kind(_step_programs, _causal_model)


def _called(kind: type[D], parts: RankParts) -> type[D]:
    """Return a class called like the model's own, by which pipelines and generate's code know what a model can do."""
    name = parts.programs.signature.model_class
    return type(name, (kind,), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _called_model(parts: RankParts, runner: RunnerParts) -> DistributedModel:
    why = parts.no_generate or f"{parts.programs.signature.model_class} was split without a cache"
    return _called(DistributedModel, parts)(runner, _step_programs(parts.programs), why, parts.main_input_name)


def _causal_model(parts: RankParts, runner: RunnerParts) -> DistributedCausalLM:
    return _called(DistributedCausalLM, parts)(runner, _step_programs(parts.programs), parts.skeleton)


def _step_programs(programs: RankPrograms[Any]) -> GuardedPrograms[Any]:
    return programs.guarded(programs.step, programs.program)


def _own_cache_model(parts: RankParts, runner: RunnerParts) -> DistributedCausalLM:
    programs = parts.programs
    return _called(DistributedOwnCacheLM, parts)(
        runner, _prompt_programs(programs), steps=_phase_programs(programs, programs.step)
    )


def _prompt_programs(programs: RankPrograms[Any]) -> GuardedPrograms[Any]:
    return _phase_programs(programs, programs.prompt)


def _phase_programs(programs: RankPrograms[V], first: V) -> GuardedPrograms[Any]:
    """Return the programs of a prompt, or of a step, and what is handed over after each to where the usual step reads
    it."""
    usual = programs.of_column(programs.step)

    def with_handovers(variant: V) -> Phase:
        column = programs.of_column(variant)
        check_reads(column, usual)
        return programs.program(variant), handovers(column, usual)

    return programs.guarded(first, with_handovers)


def _seq2seq_model(parts: RankParts, runner: RunnerParts) -> DistributedCausalLM:
    programs = parts.programs
    kind = DistributedSeq2SeqLM if parts.skeleton is None else seq2seq_class(type(parts.skeleton))
    return _called(kind, parts)(
        runner,
        _seq2seq_programs(programs),
        encoder=programs.program(programs.encoder_of(programs.step)),
        main_input_name=parts.main_input_name,
        skeleton=parts.skeleton,
    )


def _seq2seq_programs(programs: RankPrograms[Any]) -> GuardedPrograms[Any]:
    return programs.guarded(programs.step, lambda variant: _with_encoder(programs, variant))


def _with_encoder(programs: RankPrograms[V], variant: V) -> tuple[RankProgram, RankProgram]:
    encoder = programs.encoder_of(variant)
    assert encoder is not None, "all variants of a decoder read an encoder's cache"
    return programs.program(encoder), programs.program(variant)
