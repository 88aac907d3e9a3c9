"""`Compilation`: the variants of one model, their plans, and the programs of all ranks made of them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.fx
from transformers import PretrainedConfig

from autodist_fx.calls.call import Call
from autodist_fx.calls.lengths import Lengths, lengths_of
from autodist_fx.compiler.compile_options import CompileOptions
from autodist_fx.compiler.pause_gc import garbage_stays
from autodist_fx.compiler.source import VariantSource
from autodist_fx.compiler.torch_state import compiler_state
from autodist_fx.compiler.variant import Variant
from autodist_fx.errors import AutodistError
from autodist_fx.tracing import forms_of
from cost_model.graph.op_graph import OpGraph
from cost_model.mesh import Mesh
from cost_model.partition_plan import PartitionPlan
from passes.fx import node_meta
from passes.fx.run_passes import history_text
from passes.partition.pipeline import emit_rank
from passes.program.rank_program import RankProgram
from passes.verify.cache_handover import verify_handover
from passes.verify.verify import verify as verify_programs

MOST_STRUCTURES = 8  # of a model that goes back and forth between some: adapters on, off, merged


class Compilation:
    """What `compile` makes: variants, a plan, programs; no weights are loaded and nothing runs.

    `source` gives the variants; here they are kept, found again for a call, emitted for each rank, and verified.
    """

    def __init__(self, source: VariantSource, options: CompileOptions) -> None:
        self.source = source
        self.options = options
        self._set = source.first()
        self._sets = [self._set]  # the one used last comes last

    @compiler_state()
    def follow(self) -> None:
        """Go over to variants of the model as it stands now: traced, planned and verified where its structure is new.

        `plan`, `graph`, `program` and the rest are then of these. Raises what `compile` raises for such a model.
        """
        structure = self.source.structure()
        if structure == self._set.structure:
            return
        found = next((each for each in self._sets if each.structure == structure), None)
        if found is None:
            found = self.source.first()
            for variant in found.all:
                self._checked(variant)
        self._sets = [*(each for each in self._sets if each is not found), found][-MOST_STRUCTURES:]
        self._set = found

    @property
    def structure(self) -> Hashable:
        """The structure of the model that the variants now are of."""
        return self._set.structure

    @property
    def main(self) -> Variant:
        """The variant that `compile` was asked for: `plan`, `graph` and `program` are of this one."""
        return self._set.main

    @property
    def prompt(self) -> Variant | None:
        """The variant that comes before the main one, a step, in a model with a cache of its own."""
        return self._set.prompts[0] if self._set.prompts else None

    @property
    def plan(self) -> PartitionPlan:
        """Every decision made; print it, save it, compare it."""
        return self.main.whole_plan or self.main.plan

    @property
    def verifies(self) -> bool:
        """Whether programs made later are proven, too."""
        return self.options.verify

    @property
    def mesh(self) -> Mesh:
        return self.main.plan.mesh

    @property
    def config(self) -> PretrainedConfig:
        return self.main.traced.config

    @property
    def graph(self) -> torch.fx.GraphModule:
        """The whole model's normalised graph, which the ranks' graphs were made from; parameters on meta."""
        return self.main.traced.graph_module

    @property
    def op_graph(self) -> OpGraph:
        """The same as the cost model sees it."""
        return self.main.graph

    def program(self, rank: int) -> RankProgram:
        """Everything that global rank `rank` needs; parameters on meta until loaded."""
        return self.program_of(self.main, rank)

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        """Real values by name of every buffer and constant that the programs use."""
        parts = (self.main.encoder, self.prompt, self.main)
        modules = [v.traced.graph_module for v in parts if v is not None]
        return {name: b for module in modules for name, b in module.named_buffers(remove_duplicate=False)}

    def encoder_program(self, rank: int) -> RankProgram | None:
        """What global rank `rank` runs once for an input, before `program` at each step of a decoder; None where the
        model, or this form of it, has no such part. It writes what the steps read into their cache."""
        return None if self.main.encoder is None else self.program_of(self.main.encoder, rank)

    def prompt_program(self, rank: int) -> RankProgram | None:
        """What global rank `rank` runs for a prompt, where the model has a cache of its own; `program` is then that of
        each step after it. None for all other models."""
        return None if self.prompt is None else self.program_of(self.prompt, rank)

    @property
    def prompt_plan(self) -> PartitionPlan | None:
        """The plan of the prompt's programs, where these are others than the steps'."""
        return None if self.prompt is None else self.prompt.plan

    def verify(self) -> None:
        """Prove every rank's program (passes/verify/verify.py). Raises VerificationError, which names the node."""
        for variants in self.variant_groups:
            for variant in variants:
                self.verify_variant(variant)

    @property
    def variant_groups(self) -> list[list[Variant]]:
        """The main variants, in the groups that run one after the other: a prompt's and its step's are one group."""
        return self._set.groups

    def all_programs(self, variant: Variant) -> list[RankProgram]:
        """The programs of every global rank, in order."""
        variant.programs = {rank: self.program_of(variant, rank) for rank in range(self.mesh.size)}
        return list(variant.programs.values())

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The variants made so far, the main one first; in a model with a cache of its own, prompts' too."""
        return self._set.all

    def new_variant(
        self, *, use_cache: bool, input_names: Sequence[str] | None = None, fixed: Mapping[str, object] | None = None
    ) -> Variant:
        """A variant that is none of `variants`, planned for its own lengths; verified like the first."""
        return self._checked(self.source.for_inputs(use_cache=use_cache, input_names=input_names, fixed=fixed))

    @compiler_state()
    def variant_for(self, call: Call, past: int, kept: Mapping[str, Any] | None = None) -> Variant:
        """The variant for this call with `past` tokens in its cache; made at first use. `kept`: what an encoder read
        before."""
        specs = forms_of(call.tensors, self.main.traced.facts, past)
        alike = [variant for variant in self._set.of_calls if variant.takes(specs, call)]
        if not alike:
            alike = [self._checked(self.source.for_call(call, specs, self._set.of_calls))]
            self._set.others += alike
        lengths = lengths_of(alike[0].forms, {**(kept or {}), **call.tensors}, past)
        return self._fitting(alike, lengths, self._set.others)

    @compiler_state()
    def phases(self) -> tuple[Variant, Variant]:
        """(prompt, step) of a model with a cache of its own; made at first use."""
        if not self._set.prompts or self._set.step is None:
            prompt, step = self.source.phases()
            self._set.prompts, self._set.step = [self._checked(prompt)], self._checked(step)
        return self._set.prompts[0], self._set.step

    @compiler_state()
    def prompt_for(self, lengths: Lengths) -> Variant:
        """The variant of a prompt of these lengths, in a model with a cache of its own; made at first use."""
        return self._fitting(self._set.prompts, lengths, self._set.prompts)

    @compiler_state()
    def at_lengths(self, lengths: Lengths) -> Variant:
        """The main variant (that of a prompt, in a model with a cache of its own) at these lengths, by letter.

        Raises AutodistError where the model is no longer the one that was compiled.
        """
        if self.source.structure() != self._set.structure:
            raise AutodistError(f"{self.plan.model} is no longer as it was compiled: compile it again")
        if self._set.prompts:
            return self.prompt_for(lengths)
        main = self.main
        alike = [
            v for v in self._set.of_calls if v.traced.use_cache == main.traced.use_cache and v.forms == main.forms
        ]
        return self._fitting(alike, lengths, self._set.others)

    def _fitting(self, alike: Sequence[Variant], lengths: Lengths, made: list[Variant]) -> Variant:
        """That of variants for the same call which is for these lengths; made at first use, and put into `made`."""
        for variant in alike:
            if variant.fits(lengths):
                return variant
        variant = self._checked(self.source.at_lengths(alike, lengths))
        made.append(variant)
        return variant

    def _checked(self, variant: Variant) -> Variant:
        """A new variant, verified where `compile` was asked to verify."""
        if self.verifies:
            self.verify_variant(variant)
        return variant

    @compiler_state()
    def program_of(self, variant: Variant, rank: int) -> RankProgram:
        """The program of one of `variants`, or of the encoder of one, for global rank `rank`."""
        self.mesh.coordinates(rank)  # names a rank that is not there
        if rank not in variant.programs:
            variant.programs[rank] = emit_rank(
                variant.traced.graph_module,
                variant.plan,
                rank,
                layer_kinds=variant.traced.layer_kinds,
                dump_dir=self.options.dump_dir,
                sources=variant.sources,
                train=self.options.train and not variant.traced.use_cache,
                stage_uses={s: uses for p in variant.programs.values() for s, uses in p.stage_uses.items()},
            )
            if self.options.verbose:
                print(_passes_text(variant, rank))
        return variant.programs[rank]

    @garbage_stays()
    def verify_variant(self, variant: Variant) -> None:
        """Prove the programs of one variant, as `verify` does."""
        programs = self.all_programs(variant)
        verify_programs(programs, variant.plan, variant.graph, variant.traced.graph_module)
        if variant.encoder is not None:
            self.verify_variant(variant.encoder)
            writers = self.all_programs(variant.encoder)
            written = variant.encoder.plan, variant.encoder.graph
            verify_handover(writers, written, programs, (variant.plan, variant.graph))


def _passes_text(variant: Variant, rank: int) -> str:
    """What the passes did for one rank, and, with the first rank that is made, on the whole graph."""
    whole = variant.traced.graph_module
    parts = [(f"rank {rank}", variant.programs[rank].graph_module)]
    if len(variant.programs) == 1:
        parts.insert(0, (f"{variant.traced.model_class}, the whole graph", whole))
    return "\n\n".join(f"{title}\n{history_text(node_meta.history(graph))}" for title, graph in parts)
