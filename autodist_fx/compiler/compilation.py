"""`Compilation`: the variants of one model, their plans, and the programs of all ranks made from them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.fx
from transformers import PretrainedConfig

from autodist_fx.calls.call import Call
from autodist_fx.calls.input_spec import InputSpec
from autodist_fx.calls.input_specs import specs_of
from autodist_fx.calls.lengths import Lengths, lengths_of
from autodist_fx.calls.value_guards import hold
from autodist_fx.compiler.compile_options import CompileOptions
from autodist_fx.compiler.pause_gc import garbage_stays
from autodist_fx.compiler.source import VariantSource
from autodist_fx.compiler.torch_state import compiler_state
from autodist_fx.compiler.variant import Variant
from autodist_fx.errors import AutodistError
from cost_model.graph.op_graph import OpGraph
from cost_model.mesh import Mesh
from cost_model.partition_plan import PartitionPlan
from passes.fx import node_meta
from passes.fx.run_passes import history_text
from passes.partition.pipeline import emit_rank
from passes.program.rank_program import RankProgram
from passes.verify.cache_handover import verify_handover
from passes.verify.schedule import verify_in_flight
from passes.verify.verify import verify as verify_programs

MOST_STRUCTURES = 8  # kept for a model that goes back and forth between some: adapters on, off, merged


class Compilation:
    """The compiled state behind `compile`: variants, plans and programs. It loads no weights and runs nothing.

    `source` makes the variants; this class keeps them, finds the one for a call, emits its programs, and verifies them.
    """

    def __init__(self, source: VariantSource, options: CompileOptions) -> None:
        self.source = source
        self.options = options
        self._set = source.first()
        self._sets = [self._set]  # least recently used first

    @compiler_state()
    def follow(self) -> None:
        """Switch to variants of the model as it is now; they are
        traced, planned and verified where its structure is new.

        `plan`, `graph`, `program` and the rest then belong to these. Raises whatever `compile` raises for such a model.
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
        """The structure of the model that the current variants were made for."""
        return self._set.structure

    @property
    def main(self) -> Variant:
        """The variant that `compile` was asked for; `plan`, `graph` and `program` belong to it."""
        return self._set.main

    @property
    def prompt(self) -> Variant | None:
        """The prefill variant of a model with its own recurrent cache; None for all others."""
        return self._set.prompts[0] if self._set.prompts else None

    @property
    def plan(self) -> PartitionPlan:
        """Every decision made; print it, save it, compare it."""
        return self.main.whole_plan or self.main.plan

    @property
    def verifies(self) -> bool:
        """True if programs that are made later are verified, too."""
        return self.options.verify

    @property
    def mesh(self) -> Mesh:
        return self.main.plan.mesh

    @property
    def config(self) -> PretrainedConfig:
        return self.main.traced.config

    @property
    def graph(self) -> torch.fx.GraphModule:
        """The whole model's normalised graph, from which the ranks' graphs are made; its parameters are on meta."""
        return self.main.traced.graph_module

    @property
    def op_graph(self) -> OpGraph:
        """The main variant's graph in the cost model's words."""
        return self.main.graph

    def program(self, rank: int) -> RankProgram:
        """Return the program of the main variant for global rank `rank`; parameters are on meta until loaded."""
        return self.program_of(self.main, rank)

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        """Real values of every buffer and constant of the main programs by name, in their own shapes and dtypes."""
        parts = (self.main.encoder, self.prompt, self.main)
        modules = [v.traced.graph_module for v in parts if v is not None]
        return {name: b for module in modules for name, b in module.named_buffers(remove_duplicate=False)}

    def encoder_program(self, rank: int) -> RankProgram | None:
        """Return the program that global rank `rank` runs once per input, before `program` runs at each decoding step;
        None where the main variant has no encoder. It writes the cross-attention cache that the steps read."""
        return None if self.main.encoder is None else self.program_of(self.main.encoder, rank)

    def prompt_program(self, rank: int) -> RankProgram | None:
        """Return the prefill program of global rank `rank` in a model with its own recurrent cache, whose `program`
        then runs each later step. None for all other models."""
        return None if self.prompt is None else self.program_of(self.prompt, rank)

    @property
    def prompt_plan(self) -> PartitionPlan | None:
        """The plan of the prefill programs in a model with its own recurrent cache; None for all others."""
        return None if self.prompt is None else self.prompt.plan

    def verify(self) -> None:
        """Prove every rank's program (passes/verify/verify.py). Raises VerificationError, which names the node."""
        for variants in self.variant_groups:
            for variant in variants:
                self.verify_variant(variant)

    @property
    def variant_groups(self) -> list[list[Variant]]:
        """The main variants in groups, each of which runs in order: prompt and step form one group."""
        return self._set.groups

    def all_programs(self, variant: Variant) -> list[RankProgram]:
        """Return the programs of every global rank, in order of ranks."""
        variant.programs = {rank: self.program_of(variant, rank) for rank in range(self.mesh.size)}
        return list(variant.programs.values())

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The variants made so far, the main one first; prompts too, in a model with its own recurrent cache."""
        return self._set.all

    def new_variant(
        self, *, use_cache: bool, input_names: Sequence[str] | None = None, fixed: Mapping[str, object] | None = None
    ) -> Variant:
        """Make a variant that is not kept in `variants`, planned for its own lengths, and verified like the first."""
        return self._checked(self.source.for_inputs(use_cache=use_cache, input_names=input_names, fixed=fixed))

    @compiler_state()
    def variant_for(self, call: Call, past: int, kept: Mapping[str, Any] | None = None) -> Variant:
        """Return the variant for this call with `past` tokens in its cache; made on first use.

        `kept` holds the encoder's inputs of an earlier call, which set the size symbol E. Raises AutodistError where
        there is no variant for the call.
        """
        specs = self._specs(call, past)
        alike = self._alike(call, specs, past)
        if not alike:
            alike = [self._checked(self.source.for_call(call, specs, past, self._set.of_calls))]
            self._set.others += alike
        return self._fitting(alike, _lengths(alike[0], call, past, kept), self._set.others)

    def known_for(self, call: Call, past: int) -> Variant | None:
        """The variant that `variant_for` gives, None where it is yet to be made."""
        alike = self._alike(call, self._specs(call, past), past)
        return next((v for v in alike if v.fits(_lengths(v, call, past, None))), None)

    def serves(self, variant: Variant, call: Call, past: int) -> bool:
        """True if `variant` is for this call, too, with `past` tokens in its cache."""
        alike = self._alike(call, self._specs(call, past), past)
        return any(variant is each for each in alike) and variant.fits(_lengths(variant, call, past, None))

    def _specs(self, call: Call, past: int) -> dict[str, InputSpec]:
        self.main.traced.check_images(call.tensors)
        return specs_of(call.tensors, self.main.traced.facts, past)

    def _alike(self, call: Call, specs: Mapping[str, InputSpec], past: int) -> list[Variant]:
        """Return the variants made for this call, each for sizes of its own."""
        alike = [variant for variant in self._set.of_calls if variant.made_for.takes(call, specs)]
        return [v for v in alike if not v.traced.value_guards or hold(v.traced.value_guards, call.with_mask(past))]

    @compiler_state()
    def phases(self) -> tuple[Variant, Variant]:
        """Return (prompt, step) of a model with its own recurrent cache; made on first use."""
        if not self._set.prompts or not self._set.steps:
            prompt, step = self.source.phases()
            self._set.prompts, self._set.steps = [self._checked(prompt)], [self._checked(step)]
        return self._set.prompts[0], self._set.steps[0]

    @compiler_state()
    def prompt_for(self, lengths: Lengths) -> Variant:
        """Return the prefill variant for these lengths of a model with its own recurrent cache; made on first use."""
        return self._fitting(self._set.prompts, lengths, self._set.prompts)

    @compiler_state()
    def step_for(self, lengths: Lengths) -> Variant:
        """Return the variant of a step at these lengths of a model with its own recurrent cache; made on first use."""
        return self._fitting(self._set.steps, lengths, self._set.steps)

    @compiler_state()
    def at_lengths(self, lengths: Lengths) -> Variant:
        """Return the main variant at these lengths, by size symbol; in a model with its own recurrent cache the
        prefill variant, or where tokens are cached that of a step.

        Raises AutodistError where the model is no longer the one that was compiled.
        """
        if self.source.structure() != self._set.structure:
            raise AutodistError(f"{self.plan.model} is no longer as it was compiled: compile it again")
        if self._set.prompts:
            return self.step_for(lengths) if lengths["P"] else self.prompt_for(lengths)
        main = self.main
        alike = [
            v for v in self._set.of_calls if v.traced.use_cache == main.traced.use_cache and v.specs == main.specs
        ]
        return self._fitting(alike, lengths, self._set.others)

    def _fitting(self, alike: Sequence[Variant], lengths: Lengths, made: list[Variant]) -> Variant:
        """Return the one of `alike`, variants for one call, whose
        guards hold at `lengths`; else add a new one to `made`."""
        for variant in alike:
            if variant.fits(lengths):
                return variant
        variant = self._checked(self.source.at_lengths(alike, lengths))
        made.append(variant)
        return variant

    def _checked(self, variant: Variant) -> Variant:
        """Verify a new variant where `compile` was asked to verify, and return it."""
        if self.verifies:
            self.verify_variant(variant)
        return variant

    @compiler_state()
    def program_of(self, variant: Variant, rank: int) -> RankProgram:
        """Return the program of a variant, or of a variant's encoder, for global rank `rank`; emitted on first use."""
        self.mesh.coordinates(rank)  # raises for a rank that the mesh does not have
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
            if self.mesh.pp > 1 and not self.options.train:
                variant.programs[rank].rows = variant.rows
                if variant.traced.use_cache:
                    variant.programs[rank].whole_steps = variant.whole_steps
            if self.options.verbose:
                print(_passes_text(variant, rank))
        return variant.programs[rank]

    @garbage_stays()
    def verify_variant(self, variant: Variant) -> None:
        """Prove the programs of one variant, and of its encoder where it has one. Raises VerificationError."""
        programs = self.all_programs(variant)
        verify_programs(programs, variant.plan, variant.graph, variant.traced.graph_module)
        if self.mesh.pp > 1 and not variant.rows.reason and not self.options.train:
            verify_in_flight(programs)
        if variant.encoder is not None:
            self.verify_variant(variant.encoder)
            writers = self.all_programs(variant.encoder)
            written = variant.encoder.plan, variant.encoder.graph
            verify_handover(writers, written, programs, (variant.plan, variant.graph))


def _passes_text(variant: Variant, rank: int) -> str:
    """Render what the passes did for one rank, and, for the
    first rank that is made, what they did to the whole graph."""
    whole = variant.traced.graph_module
    parts = [(f"rank {rank}", variant.programs[rank].graph_module)]
    if len(variant.programs) == 1:
        parts.insert(0, (f"{variant.traced.model_class}, the whole graph", whole))
    return "\n\n".join(f"{title}\n{history_text(node_meta.history(graph))}" for title, graph in parts)


def _lengths(variant: Variant, call: Call, past: int, kept: Mapping[str, Any] | None) -> Lengths:
    return lengths_of(variant.specs, {**(kept or {}), **call.tensors}, past)
