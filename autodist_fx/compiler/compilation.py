"""The traced forms of one model, their plans, and the programs of all ranks made of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.fx
from transformers import PretrainedConfig, PreTrainedModel

from autodist_fx.calls.call import FILLED_IN, Call
from autodist_fx.calls.lengths import Lengths, lengths_of
from autodist_fx.compiler.compile_options import CompileOptions
from autodist_fx.compiler.pause_gc import garbage_stays
from autodist_fx.compiler.variant import Variant
from autodist_fx.tracing import (
    InputForm,
    empty_model,
    forms_of,
    has_own_cache,
)
from autodist_fx.tracing.meta_model import class_of
from cost_model.graph.op_graph import OpGraph
from cost_model.mesh import Mesh
from cost_model.partition_plan import PartitionPlan
from cost_model.request.plan_request import PlanRequest
from passes.partition.pipeline import emit_rank
from passes.program.rank_program import RankProgram
from passes.verify.cache_handover import verify_handover
from passes.verify.verify import verify as verify_programs


class Compilation:
    """What `compile` makes: variants, a plan, programs; no weights are loaded and nothing runs."""

    def __init__(
        self,
        model: PreTrainedModel | PretrainedConfig,
        request: PlanRequest,
        variant: Variant,
        options: CompileOptions,
        *,
        prompt: Variant | None = None,
    ) -> None:
        self._options = options
        self._always = dict(options.concrete_args)
        self._model = model
        self._more_prompts: list[Variant] = []  # for lengths at which the model's code goes another way
        self._prompt = prompt  # what the main variant, a step, comes after, in a model with a cache of its own
        self._request = request
        self._main = self._step = variant
        self._variants = [variant]

    @property
    def plan(self) -> PartitionPlan:
        """Every decision made; print it, save it, compare it."""
        return self._main.whole_plan or self._main.plan

    @property
    def verifies(self) -> bool:
        """Whether programs made later are proven, too."""
        return self._options.verify

    @property
    def mesh(self) -> Mesh:
        return self._main.plan.mesh

    @property
    def config(self) -> PretrainedConfig:
        return self._main.traced.config

    @property
    def graph(self) -> torch.fx.GraphModule:
        """The whole model's normalised graph, which the ranks' graphs were made from; parameters on meta."""
        return self._main.traced.graph_module

    @property
    def op_graph(self) -> OpGraph:
        """The same as the cost model sees it."""
        return self._main.graph

    def program(self, rank: int) -> RankProgram:
        """Everything that global rank `rank` needs; parameters on meta until loaded."""
        return self._program(self._main, rank)

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        """Real values by name of every buffer and constant that the programs use."""
        parts = (self._main.encoder, self._prompt, self._main)
        modules = [v.traced.graph_module for v in parts if v is not None]
        return {name: b for module in modules for name, b in module.named_buffers(remove_duplicate=False)}

    def encoder_program(self, rank: int) -> RankProgram | None:
        """What global rank `rank` runs once for an input, before `program` at each step of a decoder; None where the
        model, or this form of it, has no such part. It writes what the steps read into their cache."""
        return None if self._main.encoder is None else self._program(self._main.encoder, rank)

    def program_of(self, variant: Variant, rank: int) -> RankProgram:
        """Of one of `variants`, or of the encoder of one."""
        return self._program(variant, rank)

    def prompt_program(self, rank: int) -> RankProgram | None:
        """What global rank `rank` runs for a prompt, where the model has a cache of its own; `program` is then that of
        each step after it. None for all other models."""
        return None if self._prompt is None else self._program(self._prompt, rank)

    @property
    def prompt_plan(self) -> PartitionPlan | None:
        """The plan of the prompt's programs, where these are others than the steps'."""
        return None if self._prompt is None else self._prompt.plan

    def verify(self) -> None:
        """Prove every rank's program (passes/verify/verify.py). Raises VerificationError, which names the node."""
        for variants in self.variant_groups:
            for variant in variants:
                self._verify(variant)

    @property
    def variant_groups(self) -> list[list[Variant]]:
        """The main variants, in the groups that run one after the other: a prompt's and its step's are one group."""
        if self._prompt is None:
            return [[self._main]]
        phases = [self._prompt, self._step]
        return [phases] if self._main is self._step else [phases, [self._main]]

    def all_programs(self, variant: Variant) -> list[RankProgram]:
        """The programs of every global rank, in order."""
        return [self._program(variant, rank) for rank in range(self.mesh.size)]

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The traced forms made so far, the main one first; in a model with a cache of its own, steps' prompts too."""
        every = (self._prompt, *self._more_prompts, *self._variants)
        others = [v for v in every if v is not None and v is not self._main]
        return (self._main, *others)

    @property
    def always(self) -> Mapping[str, object]:
        """Arguments of every call (concrete_args)."""
        return self._always

    @property
    def shape(self) -> PreTrainedModel:
        """The model, or one like it on meta."""
        return empty_model(self._model) if isinstance(self._model, PretrainedConfig) else self._model

    @property
    def has_own_cache(self) -> bool:
        return has_own_cache(class_of(self._model))

    def new_variant(
        self, *, use_cache: bool, input_names: Sequence[str] | None = None, fixed: Mapping[str, object] | None = None
    ) -> Variant:
        """Another form of the model, planned for its own lengths; verified like the first."""
        request = replace(self._request, sizes=())
        variant = Variant.make(self._model, request, use_cache, input_names, fixed, None)
        if self.verifies:
            self._verify(variant)
        return variant

    def _accepted(self, names: frozenset[str]) -> tuple[str, ...]:
        """Without those of our own filling-in that the model's forward does not take."""
        accepted = inspect.signature(self._model.forward).parameters  # type: ignore[union-attr]
        return tuple(sorted(n for n in names if n in accepted or n not in FILLED_IN))

    def _variant_for(self, call: Call, past: int, kept: Mapping[str, Any] | None = None) -> Variant:
        """The traced form for this call; traced, planned and verified at first use. `kept`: what an encoder read
        before."""
        forms = forms_of(call.tensors, self._main.traced.facts, past)
        alike = [variant for variant in self._variants if variant.takes(forms, call)]
        if not alike:
            alike = [self._new_variant_for(call, forms)]
            self._variants += alike
        lengths = lengths_of(alike[0].forms, {**(kept or {}), **call.tensors}, past)
        return self._at_lengths(alike, lengths, self._variants)

    def _at_lengths(self, alike: Sequence[Variant], lengths: Lengths, made: list[Variant]) -> Variant:
        """Of graphs for the same call, that which is for these lengths; made at first use, and put into `made`."""
        for variant in alike:
            if variant.fits(lengths):
                return variant
        variant = alike[0].at_lengths(lengths, replace(self._request, sizes=()), alike[1:])
        if self.verifies:
            self._verify(variant)
        made.append(variant)
        return variant

    def _new_variant_for(self, call: Call, forms: Mapping[str, InputForm]) -> Variant:
        given = frozenset(forms)
        names: tuple[str, ...] | None = self._accepted(given)
        if call.use_cache:
            filled_in = FILLED_IN - {"input_ids"} if "inputs_embeds" in given else FILLED_IN
            names = None if given <= FILLED_IN else self._accepted(given | filled_in | {"past_key_values"})
        variant = Variant.make(self._model, self._request, call.use_cache, names, call.fixed, None, forms)
        if self.verifies:
            self._verify(variant)
        return variant

    def at_lengths(self, lengths: Lengths) -> Variant:
        """The main form (of a prompt, in a model with a cache of its own) at these lengths, by letter."""
        if self._prompt is not None:
            return self._at_lengths([self._prompt, *self._more_prompts], lengths, self._more_prompts)
        main = self._main
        alike = [v for v in self._variants if v.traced.use_cache == main.traced.use_cache and v.forms == main.forms]
        return self._at_lengths(alike, lengths, self._variants)

    def new_phases(self) -> tuple[Variant, Variant]:
        """(prompt, step) of a model with a cache of its own."""
        return Variant.make_phases(self._model, self._request, None, None)

    def _program(self, variant: Variant, rank: int) -> RankProgram:
        self.mesh.coordinates(rank)  # names a rank that is not there
        if rank not in variant.programs:
            variant.programs[rank] = emit_rank(
                variant.traced.graph_module,
                variant.plan,
                rank,
                layer_kinds=variant.traced.layer_kinds,
                dump_dir=self._options.dump_dir,
                sources=variant.sources,
                train=self._options.train and not variant.traced.use_cache,
                stage_uses=variant.stage_uses,
            )
        return variant.programs[rank]

    def verify_form(self, variant: Variant) -> None:
        """As `verify`, one of `variants`."""
        self._verify(variant)

    @garbage_stays()
    def _verify(self, variant: Variant) -> None:
        programs = self.all_programs(variant)
        verify_programs(programs, variant.plan, variant.graph, variant.traced.graph_module)
        if variant.encoder is not None:
            self._verify(variant.encoder)
            writers = self.all_programs(variant.encoder)
            written = variant.encoder.plan, variant.encoder.graph
            verify_handover(writers, written, programs, (variant.plan, variant.graph))
