"""Makes the programs of one rank of the model, its weights, the mesh it joined, and what was asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from autodist_fx.calls.call import Call, step_call
from autodist_fx.calls.lengths import Lengths
from autodist_fx.calls.value_guards import hold
from autodist_fx.compiler.compilation import Compilation
from autodist_fx.compiler.compile import compile_to_run
from autodist_fx.compiler.compile_options import CompileOptions
from autodist_fx.compiler.variant import Variant
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.comm.agreement import Facts, agree, digest
from autodist_fx.runtime.comm.process_group import JoinedRank
from autodist_fx.runtime.generation.call_programs import CallProgram
from autodist_fx.runtime.generation.guarded_programs import GuardedPrograms
from autodist_fx.startup.build_model import generating_programs
from autodist_fx.startup.facts import shared_weight_facts
from autodist_fx.startup.model_snapshot import ModelSnapshot
from autodist_fx.startup.stage_forecast import StageForecast
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
    """Makes this process's programs, of the model, its weights, the mesh it joined, and what was asked for.

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
        """Return options to compile with: to emit other ranks' programs and prove them is rank 0's work alone
        (`agreed`)."""
        return replace(self.options, verify=False)

    def agreed(
        self, compile: Callable[[], tuple[Compilation, str | None]]
    ) -> tuple[Compilation, RankProgram, str | None]:
        """Return what `compile()` makes, this rank's program of it, and why it does not generate (None: it does), when
        all ranks have made the same."""

        began = time.perf_counter()

        def made() -> tuple[tuple[Compilation, RankProgram, str | None], Facts]:
            compiled, no_generate = compile()
            for variant in (each for group in compiled.variant_groups for each in group):
                self._keep_state(variant)
            program = compiled.program(self.joined.rank)
            self.spent["trace and plan"] = time.perf_counter() - began
            plans = [p for p in (compiled.prompt_plan, compiled.plan) if p is not None]
            return (compiled, program, no_generate), {"the plan": digest("".join(map(plan_to_text, plans)))}

        def check(value: tuple[Compilation, RankProgram, str | None]) -> None:
            value[0].verify()

        agreed = self.joined.together(made, check=check if self.options.verify else None)
        self.spent["proof"] = time.perf_counter() - began - self.spent["trace and plan"]
        return agreed

    def loaded(self, compiled: Compilation, program: RankProgram, beside: RankProgram | None) -> LoadReport:
        """Load the weights of `program`, and of what runs `beside` it, when every rank has its own, and those that
        several ranks hold are the same on all of them."""

        def read() -> tuple[LoadReport, Facts]:
            report = replace(self.load(compiled, program), start_seconds=dict(self.spent))
            if beside is not None:
                report = load_beside(program, beside, lambda left: self.load(compiled, left), report)
            return report, shared_weight_facts(compiled.plan, program)

        return self.joined.together(read)

    def _keep_state(self, variant: Variant) -> None:
        """Raise AutodistError where this variant keeps a buffer that calls write on another stage than those before."""
        for part in filter(None, (variant.encoder, variant)):
            for buffer, users in part.graph.state.items():
                stage = part.plan.op(users[0]).home
                known = self.state_stages.setdefault(buffer, stage)
                if known != stage:
                    raise AutodistError(
                        f"{buffer} is kept from call to call on stage {known}, and the graph for this call has it on "
                        f"stage {stage}: cut the model behind it (cuts=...), or use pp=1"
                    )

    def made_alike(
        self, compiled: Compilation, make: Callable[[], Variant], held: Sequence[RankProgram]
    ) -> Variant:
        """Return what `make` makes of `compiled`, when all ranks have made the same; this rank's programs of it are
        loaded, with the weights of the programs `held` wherever they are the same. Raises, on all ranks, what any
        raises."""
        variant, failure = None, None
        self.refuse_changes(held)
        try:
            variant = make()
            self._keep_state(variant)
            fact = plan_to_text(variant.whole_plan or variant.plan)
        except AutodistError as error:
            failure, fact = error, str(error)
        check = None if variant is None or not self.options.verify else lambda: compiled.verify_variant(variant)
        agree(self.joined.everyone, self.joined.rank, {"the plan": digest(fact)}, failure=failure, check=check)
        assert variant is not None
        for part in (variant.encoder, variant):
            if part is not None:
                left = program = compiled.program_of(part, self.joined.rank)
                for other in held:
                    left = share_weights(other, left)
                if left.param_shards:
                    self.load(compiled, left, part)
                program.graph_module.eval()
        return variant

    def refuse_changes(self, loaded: Sequence[RankProgram]) -> None:
        """Raise AutodistError on every rank where a model in memory, on any rank, is no longer what `loaded`, this
        rank's programs, were loaded from: a graph that is made now would mix its weights with theirs."""
        if self.snapshot is not None:
            agree(self.joined.everyone, self.joined.rank, {}, failure=self.snapshot.change(self.model, loaded))

    def load(self, compiled: Compilation, program: RankProgram, variant: Variant | None = None) -> LoadReport:
        """Load the weights of a program of `compiled`, or of one of its other variants, where one is given."""
        buffers = compiled.buffers
        if variant is not None:
            buffers |= dict(variant.traced.graph_module.named_buffers(remove_duplicate=False))
        source = self.open_weights()
        try:
            return load_program(
                self.model, source, buffers, program, device=self.joined.device, progress=self.progress
            )
        finally:
            source.close()

    def programs_beside(self, plan: PartitionPlan, loaded: Sequence[RankProgram]) -> CompiledPrograms:
        """Return the programs of a rank that runs by `plan`, with the weights of those that are `loaded`."""
        compiled, _ = compile_to_run(self.model, Compilation, self.request, self.unverified, plan)
        return CompiledPrograms(self, compiled, list(loaded))


class CompiledPrograms:
    """The RankPrograms of a compilation. Those of its main variants are loaded; others, which are made at first use,
    get the weights of all that are: `loaded`."""

    def __init__(self, startup: RankStartup, compiled: Compilation, loaded: list[RankProgram]) -> None:
        self._startup, self._compiled, self._loaded = startup, compiled, loaded
        self._calls: list[Variant] = []  # made and loaded by all ranks
        self._forecasts: dict[int, StageForecast] = {}  # by id of the variant, which the compilation keeps
        self.signature = compiled.source.signature

    @property
    def step(self) -> Variant:
        return self._compiled.variants[0]

    @property
    def prompt(self) -> Variant | None:
        return self._compiled.prompt

    def encoder_of(self, variant: Variant) -> Variant | None:
        return variant.encoder

    def program(self, variant: Variant) -> RankProgram:
        return self._compiled.program_of(variant, self._startup.joined.rank)

    def of_column(self, variant: Variant) -> list[RankProgram]:
        joined = self._startup.joined
        return [self._compiled.program_of(variant, rank) for rank in joined.mesh.column(joined.rank)]

    def guarded(self, first: Variant, run: Callable[[Variant], T]) -> GuardedPrograms[T]:
        compiled = self._compiled

        def make(lengths: Lengths) -> tuple[Guards | None, T]:
            variant = self._startup.made_alike(compiled, lambda: compiled.at_lengths(lengths), self._loaded)
            return variant.guards, run(variant)

        return GuardedPrograms([(first.guards, run(first))], make, first.specs)

    def at_lengths(self, lengths: Lengths) -> tuple[Guards | None, Any]:
        """Return (guards, programs that generate) for sizes that there is no program for yet."""
        make = generating_programs(self).make
        assert make is not None, "programs of a model that is at hand are made when they are asked for"
        return make(lengths)

    @cached_property  # a rank's model stays as it was compiled, and steps by hand ask each time
    def positions_of_values(self) -> bool:
        """Return whether the model counts positions that a call leaves out; see CallPrograms."""
        return self._compiled.source.positions_of_values

    def completed(self, call: Call) -> Call:
        """Return the call with the positions that the model counts; see CallPrograms."""
        return self._compiled.source.completed(call)

    def program_for(self, call: Call) -> CallProgram:
        """Return the program for a call; see CallPrograms."""
        compiled = self._compiled
        variant = self._known_or(lambda: compiled.variant_for(call, 0), call, 0)
        return CallProgram(
            self.program(variant),
            variant.output_order,
            lambda other: compiled.serves(variant, other, 0),
            self._forecast(variant),
        )

    @property
    def step_seconds(self) -> StageForecast:
        """Return what predicts the seconds of each stage in a step; see CallPrograms."""
        return self._forecast(self.step)

    def _forecast(self, variant: Variant) -> StageForecast:
        key = id(variant)
        if key not in self._forecasts:
            request = self._startup.request
            self._forecasts[key] = StageForecast(lambda: variant.graph, variant.plan, request)
        return self._forecasts[key]

    def is_usual(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Return whether what the step's graph assumes of values holds; see CallPrograms."""
        guards = self.step.traced.value_guards
        return not guards or hold(guards, tensors)

    def program_for_step(self, tensors: Mapping[str, torch.Tensor], past: int) -> RankProgram:
        """Return the program for a step with these inputs; see CallPrograms."""
        compiled = self._compiled
        call = step_call(tensors, self.step.fixed)

        def make() -> Variant:
            variant = compiled.variant_for(call, past)
            self.step.check_caches(variant)
            return variant

        return self.program(self._known_or(make, call, past))

    def _known_or(self, make: Callable[[], Variant], call: Call, past: int) -> Variant:
        """Return the variant for a call that is loaded already; else what `make` makes, on all ranks, and loads."""
        variant = self._compiled.known_for(call, past)
        if variant is None or not any(variant is known for known in (self.step, *self._calls)):
            variant = self._startup.made_alike(self._compiled, make, self._loaded)
            self._calls.append(variant)
            self._loaded.append(self.program(variant))
        return variant
