"""What makes the programs of one rank: the model, its weights, the mesh it joined, and what was asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from transformers import PreTrainedModel

from autodist_fx.calls.lengths import Lengths
from autodist_fx.compiler.compilation import Compilation
from autodist_fx.compiler.compile import compile_for_generation, compile_model
from autodist_fx.compiler.compile_options import CompileOptions
from autodist_fx.compiler.variant import Variant
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.comm.agreement import Facts, agree, digest
from autodist_fx.runtime.comm.process_group import JoinedRank
from autodist_fx.runtime.generation.guarded_programs import GuardedPrograms, one_way
from autodist_fx.startup.build_model import generating_programs
from autodist_fx.startup.facts import shared_weight_facts
from autodist_fx.startup.model_snapshot import ModelSnapshot
from autodist_fx.weights.load import LoadReport
from autodist_fx.weights.load_program import load_beside, load_program
from autodist_fx.weights.share import share_weights
from autodist_fx.weights.sources.source import WeightSource
from cost_model.partition_plan import PartitionPlan
from cost_model.plan.write_json import plan_to_text
from cost_model.request.plan_request import PlanRequest
from passes.fx.guards import Guards
from passes.program.rank_program import RankProgram

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RankStartup:
    """What makes this process's programs: the model, its weights, the mesh it joined, and what was asked for.

    `model` says how names are tied and called, and holds the buffers that no checkpoint has; it may be on meta.
    `options.verify`: rank 0 proves the programs of all ranks before any runs. `progress` is called with (bytes loaded,
    bytes in all). `snapshot`: the model in memory as it is when it is loaded; None for a checkpoint, whose files stay.
    """

    model: PreTrainedModel
    open_weights: Callable[[], WeightSource]
    joined: JoinedRank
    request: PlanRequest
    options: CompileOptions
    progress: Callable[[int, int], None] | None = None
    snapshot: ModelSnapshot | None = None
    state_stages: dict[str, int] = field(default_factory=dict)  # of each buffer that calls write, where it is kept
    spent: dict[str, float] = field(default_factory=dict)  # seconds so far, by what they went to

    @property
    def unverified(self) -> CompileOptions:
        """Options to compile with: to emit other ranks' programs and prove them is rank 0's work alone (`agreed`)."""
        return replace(self.options, verify=False)

    def agreed(self, compile: Callable[[], Compilation]) -> tuple[Compilation, RankProgram]:
        """What `compile()` makes, and this rank's program of it, when all ranks have made the same."""

        began = time.perf_counter()

        def made() -> tuple[tuple[Compilation, RankProgram], Facts]:
            compiled = compile()
            for variant in (each for group in compiled.variant_groups for each in group):
                self._keep_state(variant)
            program = compiled.program(self.joined.rank)
            self.spent["trace and plan"] = time.perf_counter() - began
            plans = [p for p in (compiled.prompt_plan, compiled.plan) if p is not None]
            return (compiled, program), {"the plan": digest("".join(map(plan_to_text, plans)))}

        def check(value: tuple[Compilation, RankProgram]) -> None:
            value[0].verify()

        agreed = self.joined.together(made, check=check if self.options.verify else None)
        self.spent["proof"] = time.perf_counter() - began - self.spent["trace and plan"]
        return agreed

    def loaded(self, compiled: Compilation, program: RankProgram, beside: RankProgram | None) -> LoadReport:
        """The weights of `program`, and of what runs `beside` it, when every rank has its own, and those that several
        ranks hold are the same on all of them."""

        def read() -> tuple[LoadReport, Facts]:
            report = replace(self.load(compiled, program), start_seconds=dict(self.spent))
            if beside is not None:
                report = load_beside(program, beside, lambda left: self.load(compiled, left), report)
            return report, shared_weight_facts(compiled.plan, program)

        return self.joined.together(read)

    def _keep_state(self, variant: Variant) -> None:
        """Raises AutodistError where this form keeps a buffer that calls write on another stage than those before."""
        for part in filter(None, (variant.encoder, variant)):
            for buffer, users in part.graph.state.items():
                stage = part.plan.op(users[0]).home
                known = self.state_stages.setdefault(buffer, stage)
                if known != stage:
                    raise AutodistError(
                        f"{buffer} is kept from call to call on stage {known}, and the graph for this call has it on "
                        f"stage {stage}: cut the model behind it (cuts=...), or use pp=1"
                    )

    def guarded(
        self, compiled: Compilation, beside: RankProgram, run: Callable[[Variant], T], first: Variant
    ) -> GuardedPrograms[T]:
        """What `run` makes of `first`, a form of `compiled` whose programs are loaded, and of graphs for other lengths;
        `beside` is a program of this rank whose weights they use."""

        def make(lengths: Lengths) -> tuple[Guards | None, T]:
            variant, failure = None, None
            parts = (first.encoder, first)
            self.refuse_changes([beside, *(compiled.program_of(p, self.joined.rank) for p in parts if p is not None)])
            try:
                variant = compiled.at_lengths(lengths)
                self._keep_state(variant)
                fact = plan_to_text(variant.whole_plan or variant.plan)
            except AutodistError as error:
                failure, fact = error, str(error)
            check = None if variant is None or not self.options.verify else lambda: compiled.verify_variant(variant)
            agree(self.joined.everyone, self.joined.rank, {"the plan": digest(fact)}, failure=failure, check=check)
            assert variant is not None
            for part in (variant.encoder, variant):
                if part is not None:
                    program = compiled.program_of(part, self.joined.rank)
                    left = share_weights(beside, program)
                    if left.param_shards:
                        self.load(compiled, left)
                    program.graph_module.eval()
            return variant.conditions, run(variant)

        return GuardedPrograms([(first.conditions, run(first))], make, first.forms)

    def refuse_changes(self, loaded: Sequence[RankProgram]) -> None:
        """Raises AutodistError on every rank where a model in memory, on any rank, is no longer what `loaded`, this
        rank's programs, were loaded from: a graph that is made now would mix its weights with theirs."""
        if self.snapshot is not None:
            agree(self.joined.everyone, self.joined.rank, {}, failure=self.snapshot.change(self.model, loaded))

    def load(self, compiled: Compilation, program: RankProgram) -> LoadReport:
        source = self.open_weights()
        try:
            return load_program(
                self.model,
                source,
                compiled.buffers,
                program,
                device=self.joined.device,
                progress=self.progress,
            )
        finally:
            source.close()

    def whole_sequences(self, input_names: tuple[str, ...], beside: RankProgram) -> GuardedPrograms[RankProgram]:
        """The program for whole sequences of these inputs, with the weights of `beside` where both hold them alike."""
        self.refuse_changes([beside])
        options = replace(self.unverified, input_names=input_names)
        compiled, program = self.agreed(lambda: compile_model(self.model, Compilation, self.request, options))
        left = share_weights(beside, program)
        if left.param_shards:  # slices that this layout has and the other has not
            self.load(compiled, left)
        program.graph_module.eval()
        rank = self.joined.rank
        return self.guarded(compiled, beside, lambda form: compiled.program_of(form, rank), compiled.variants[0])

    def at_lengths(self, lengths: Lengths, beside: RankProgram, plan: PartitionPlan) -> tuple[Guards | None, Any]:
        """What a rank that generates by `plan` runs at lengths that it has no program for yet, and its guards; with the
        weights of `beside`, which is loaded."""
        compiled = compile_for_generation(self.model, Compilation, self.request, self.unverified, plan)
        make = generating_programs(CompiledPrograms(self, compiled, beside)).make
        assert make is not None, "programs of a model that is at hand are made when they are asked for"
        return make(lengths)


@dataclass(frozen=True, slots=True)
class CompiledPrograms:
    """The RankPrograms of a compilation. Those of its main variants are loaded; others get the weights of `loaded`."""

    startup: RankStartup
    compiled: Compilation
    loaded: RankProgram

    @property
    def step(self) -> Variant:
        return self.compiled.variants[0]

    @property
    def prompt(self) -> Variant | None:
        return None if self.compiled.prompt_plan is None else self.compiled.variants[1]

    def encoder_of(self, variant: Variant) -> Variant | None:
        return variant.encoder

    def program(self, variant: Variant) -> RankProgram:
        return self.compiled.program_of(variant, self.startup.joined.rank)

    def of_column(self, variant: Variant) -> list[RankProgram]:
        joined = self.startup.joined
        return [self.compiled.program_of(variant, rank) for rank in joined.mesh.column(joined.rank)]

    def guarded(self, first: Variant, run: Callable[[Variant], T]) -> GuardedPrograms[T]:
        return self.startup.guarded(self.compiled, self.loaded, run, first)

    def fixed(self, variant: Variant) -> GuardedPrograms[RankProgram]:
        return one_way(variant.conditions, self.program(variant), variant.other_way)

    def whole_sequences(self, input_names: tuple[str, ...]) -> GuardedPrograms[RankProgram]:
        return self.startup.whole_sequences(input_names, self.loaded)
