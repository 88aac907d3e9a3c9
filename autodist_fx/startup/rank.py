"""What makes the programs of one rank: the model, its weights, the mesh it joined, and what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel

from autodist_fx.calls.lengths import Lengths
from autodist_fx.compiler.compilation import Compilation
from autodist_fx.compiler.compile import compile_model
from autodist_fx.compiler.variant import Variant
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.comm.agreement import Facts, agree, digest
from autodist_fx.runtime.comm.process_group import JoinedRank
from autodist_fx.runtime.generation.guarded_programs import GuardedPrograms
from autodist_fx.weights.load import LoadReport
from autodist_fx.weights.load_program import load_program
from autodist_fx.weights.share import share_weights
from autodist_fx.weights.sources.source import WeightSource
from cost_model.mesh import Mesh
from cost_model.partition_plan import PartitionPlan
from cost_model.plan.write_json import plan_to_text
from passes.fx.guards import Guards
from passes.program.rank_program import RankProgram

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Options:
    mesh: Mesh
    planning: Mapping[str, Any]  # hardware, objective, pin, ...: as compile takes them
    verify: bool
    dump_dir: str | Path | None
    progress: Callable[[int, int], None] | None

    def for_compile(self, plan: PartitionPlan | None = None) -> dict[str, Any]:
        """verify=False: emitting other ranks' programs is rank 0's work alone."""
        planning = self.planning if plan is None else {"plan": plan, "hardware": self.planning["hardware"]}
        return {"tp": self.mesh.tp, "pp": self.mesh.pp, **planning, "verify": False, "dump_dir": self.dump_dir}


@dataclass(frozen=True, slots=True)
class _Rank:
    """What makes this process's programs. `model` says how names are tied and called, and holds the buffers that no
    checkpoint has; it may be on meta."""

    model: PreTrainedModel
    open_weights: Callable[[], WeightSource]
    joined: JoinedRank
    options: _Options
    facts: Facts

    def agreed(self, compiled: Compilation) -> RankProgram:
        check = compiled.verify if self.options.verify else None
        program = compiled.program(self.joined.rank)
        plans = [p for p in (compiled.prompt_plan, compiled.plan) if p is not None]
        facts = {"the plan": digest("".join(map(plan_to_text, plans))), **self.facts}
        agree(self.joined.everyone, self.joined.rank, facts, check=check)
        return program

    def ways(
        self, compiled: Compilation, beside: RankProgram, run: Callable[[Variant], T], first: Variant
    ) -> GuardedPrograms[T]:
        """What `run` makes of `first`, a form of `compiled` whose programs are loaded, and of graphs for other lengths;
        `beside` is a program of this rank whose weights they use."""

        def make(lengths: Lengths) -> tuple[Guards | None, T]:
            variant, failure = None, None
            try:
                variant = compiled.at_lengths(lengths)
                fact = plan_to_text(variant.whole_plan or variant.plan)
            except AutodistError as error:
                failure, fact = error, str(error)
            check = None if variant is None or not self.options.verify else lambda: compiled.verify_form(variant)
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

    def load(self, compiled: Compilation, program: RankProgram) -> LoadReport:
        source = self.open_weights()
        try:
            return load_program(
                self.model,
                source,
                compiled.buffers,
                program,
                device=self.joined.device,
                progress=self.options.progress,
            )
        finally:
            source.close()

    def whole_sequences(self, input_names: tuple[str, ...], beside: RankProgram) -> GuardedPrograms[RankProgram]:
        """The program for whole sequences of these inputs, with the weights of `beside` where both hold them alike."""
        options = self.options.for_compile()
        compiled = compile_model(self.model, Compilation, use_cache=False, input_names=input_names, **options)
        program = self.agreed(compiled)
        left = share_weights(beside, program)
        if left.param_shards:  # slices that this layout has and the other has not
            self.load(compiled, left)
        program.graph_module.eval()
        rank = self.joined.rank
        return self.ways(compiled, beside, lambda form: compiled.program_of(form, rank), compiled.variants[0])
