"""Starts a rank from an artifact: its programs, weights, and what generates with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
from transformers import PreTrainedModel

from autodist_fx.artifact.manifest import ArtifactError
from autodist_fx.artifact.reader import MAKE_AGAIN, SAVE_SUCH, ArtifactReader
from autodist_fx.artifact.variant_format import SavedVariant
from autodist_fx.calls.call import Call, step_call
from autodist_fx.calls.lengths import Lengths, guards_text, lengths_of
from autodist_fx.calls.model_signature import ModelSignature
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.comm.agreement import digest
from autodist_fx.runtime.comm.join_options import JoinOptions
from autodist_fx.runtime.comm.process_group import JoinedRank, join
from autodist_fx.runtime.default_hardware import default_hardware
from autodist_fx.runtime.generation.call_programs import CallProgram
from autodist_fx.runtime.generation.guarded_programs import GuardedPrograms
from autodist_fx.startup.build_model import RankModel, RankParts, build_model
from autodist_fx.startup.stage_forecast import StageForecast
from autodist_fx.weights.load import LoadReport
from autodist_fx.weights.process_memory import peak_rss_bytes, rss_bytes
from autodist_fx.weights.share import share_weights
from cost_model.costs.hardware import PRESETS, hardware
from cost_model.partition_plan import PartitionPlan
from cost_model.request.plan_request import PlanRequest
from passes.fx.guards import Guards
from passes.program.rank_program import RankProgram

T = TypeVar("T")


def start_from_artifact(artifact: ArtifactReader, options: JoinOptions) -> RankModel:
    """Join the ranks that the artifact is for, all with the same artifact, and return this process's model."""
    asked = {"the function called": "load", "the artifact": digest(artifact.manifest.to_text())}
    joined = join(artifact.mesh, options, asked)
    return joined.together(lambda: (share(artifact, joined), {}))


def share(
    artifact: ArtifactReader, joined: JoinedRank, maker: Callable[[], ProgramMaker] | None = None
) -> RankModel:
    """Return the model of `joined`, with its weights. `maker()` makes what the artifact lacks; without it that is
    refused."""
    began, rss_before = time.perf_counter(), rss_bytes()
    programs = ArtifactPrograms(artifact, joined, maker)
    weights = artifact.weights_of(joined.rank, joined.device)
    programs.program(programs.step)  # read now, and counted as loading
    report = LoadReport(
        shard_bytes=sum(t.numel() * t.element_size() for t in weights.values()),
        bytes_read=artifact.manifest.files[f"weights/rank{joined.rank}.safetensors"].bytes,
        checkpoint_bytes=sum(r.bytes for n, r in artifact.manifest.files.items() if n.startswith("weights/")),
        seconds=time.perf_counter() - began,
        rss_before_bytes=rss_before,
        peak_rss_bytes=peak_rss_bytes(),
    )
    fields = artifact.model_fields
    return build_model(
        RankParts(
            programs=programs,
            communicator=joined.communicator,
            device=joined.device,
            cuda_graphs=joined.cuda_graphs,
            config=artifact.config,
            generation_config=artifact.generation_config,
            plan=artifact.plan,
            load_report=report,
            positions_follow_mask=fields["positions_follow_mask"],
            main_input_name=fields["main_input_name"],
            skeleton=_skeleton(artifact) if fields["is_asked"] else None,
        )
    )


def _skeleton(artifact: ArtifactReader) -> PreTrainedModel:
    from autodist_fx.tracing import empty_model  # the model's own code, which is asked how it generates

    return empty_model(artifact.config)


class MadePrograms(Protocol):
    """Programs that an artifact lacks, made of the model."""

    def completed(self, call: Call) -> Call:
        """Return the call with the positions that the model counts; see CallPrograms."""

    def program_for(self, call: Call) -> CallProgram:
        """Return the program for a call; see CallPrograms."""

    def program_for_step(self, tensors: Mapping[str, torch.Tensor], past: int) -> RankProgram:
        """Return the program for a step with these inputs; see CallPrograms."""

    def at_lengths(self, lengths: Lengths) -> tuple[Guards | None, Any]:
        """Return (guards, the programs that generate at these sizes)."""


class ProgramMaker(Protocol):
    """The model of an artifact, where it is at hand."""

    def programs_beside(self, plan: PartitionPlan, loaded: Sequence[RankProgram]) -> MadePrograms:
        """Return programs of a rank that generates by `plan`, with the weights of those that are `loaded`."""


class ArtifactPrograms:
    """The RankPrograms of an artifact's files, each of which is read once."""

    def __init__(
        self, artifact: ArtifactReader, joined: JoinedRank, maker: Callable[[], ProgramMaker] | None
    ) -> None:
        self._artifact, self._joined, self._maker = artifact, joined, maker
        self._read: dict[str, RankProgram] = {}
        self.step = artifact.usual_variant()
        self._forecasts: dict[str, StageForecast] = {}

    @property
    def prompt(self) -> SavedVariant | None:
        if not self.step.phase:
            return None
        prompt = next((saved for saved in self._artifact.variants.values() if saved.phase == "prompt"), None)
        if prompt is None:
            raise ArtifactError(f"{self._artifact.directory} has steps and no prompt{MAKE_AGAIN}")
        return prompt

    def encoder_of(self, saved: SavedVariant) -> SavedVariant | None:
        return self._artifact.variants[saved.encoder] if saved.encoder else None

    def program(self, saved: SavedVariant) -> RankProgram:
        if saved.name not in self._read:
            program = self._artifact.program(self._joined.rank, saved.name, self._joined.device)
            for before in self._read.values():
                share_weights(before, program)  # one parameter, which moves in memory where either has it laid out anew
            self._read[saved.name] = program
        return self._read[saved.name]

    def of_column(self, saved: SavedVariant) -> list[RankProgram]:
        column = self._artifact.mesh.column(self._joined.rank)
        return [self._artifact.read_program(rank, saved, None) for rank in column]

    def guarded(self, first: SavedVariant, run: Callable[[SavedVariant], T]) -> GuardedPrograms[T]:
        return self._guarded(first, run, self._refuse(first) if self._maker is None else self._make)

    @property
    def signature(self) -> ModelSignature:
        return self._artifact.signature

    @property
    def positions_of_values(self) -> bool:
        """Return whether the model counts positions that a call leaves out; see CallPrograms."""
        return bool(self._artifact.model_fields["positions_of_values"])

    def completed(self, call: Call) -> Call:
        """Return the call with the positions that the model counts, where it is at hand."""
        return call if self._maker is None else self._made.completed(call)

    def program_for(self, call: Call) -> CallProgram:
        """Return the program for a call, of the model where it is at hand: an entry of the cache of splits keeps no
        such variants."""
        if self._maker is not None:
            return self._made.program_for(call)
        saved = self._saved_for(call, 0)
        return CallProgram(
            self.program(saved), saved.output_order, lambda other: self._serves(saved, other), self._forecast(saved)
        )

    @property
    def step_seconds(self) -> StageForecast:
        """Return what predicts the seconds of each stage in a step; see CallPrograms."""
        return self._forecast(self.step)

    def _forecast(self, saved: SavedVariant) -> StageForecast:
        if saved.name not in self._forecasts:
            artifact = self._artifact
            plan = artifact.read_plan(f"{saved.folder}/plan.json")
            known = PRESETS.get(plan.hardware) or hardware(default_hardware())
            devices = tuple(PRESETS.get(device.hardware, known) for device in plan.request.device_map)
            request = PlanRequest(plan.mesh, known, devices=devices)
            self._forecasts[saved.name] = StageForecast(lambda: artifact.op_graph(saved), plan, request)
        return self._forecasts[saved.name]

    def is_usual(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Return True: files hold no graph that assumes any values of inputs."""
        return True

    def program_for_step(self, tensors: Mapping[str, torch.Tensor], past: int) -> RankProgram:
        """Return the program for a step, as `program_for` does for a call."""
        if self._maker is not None:
            return self._made.program_for_step(tensors, past)
        return self.program(self._saved_for(step_call(tensors, self.step.fixed), past))

    def _saved_for(self, call: Call, past: int) -> SavedVariant:
        """Return the variant that was saved for a call, at lengths where its guards hold. Raises AutodistError."""
        variants = self._artifact.variants_for(call, past)
        lengths = lengths_of(variants[0].made_for.specs, call.tensors, past)
        for saved in variants:
            guards = self._artifact.guards_of(saved)
            if guards is None or not guards.violated(lengths):
                return saved
        raise self._guard_error(variants[0], lengths)

    def _serves(self, saved: SavedVariant, call: Call) -> bool:
        """Return whether a saved variant is for this call without a cache, too."""
        try:
            return self._saved_for(call, 0) is saved
        except AutodistError:
            return False

    @cached_property
    def _made(self) -> MadePrograms:
        assert self._maker is not None
        encoder = self.encoder_of(self.step)
        parts = [self.step, *(part for part in (encoder, self.prompt) if part is not None)]
        return self._maker().programs_beside(self._artifact.plan, [self.program(part) for part in parts])

    def _guarded(
        self,
        first: SavedVariant,
        run: Callable[[SavedVariant], T],
        make: Callable[[Lengths], tuple[Guards | None, Any]],
    ) -> GuardedPrograms[T]:
        """Return what `run` makes of a variant, and of those for the same call with other sizes; `make` makes
        others."""
        same = [saved for saved in self._artifact.variants.values() if saved.same_call(first) and saved is not first]
        found = [(self._artifact.guards_of(saved), run(saved)) for saved in (first, *same)]
        return GuardedPrograms(found, make, first.made_for.specs)

    def _make(self, lengths: Lengths) -> tuple[Guards | None, Any]:
        return self._made.at_lengths(lengths)

    def _refuse(self, saved: SavedVariant) -> Callable[[Lengths], tuple[Guards | None, Any]]:
        def refuse(lengths: Lengths) -> tuple[Guards | None, Any]:
            raise self._guard_error(saved, lengths)

        return refuse

    def _guard_error(self, saved: SavedVariant, lengths: Lengths) -> AutodistError:
        guards = self._artifact.guards_of(saved)
        lines = guards.violated(lengths) if guards is not None else []
        return AutodistError(guards_text(self._artifact.manifest.model, lengths, lines) + SAVE_SUCH)
