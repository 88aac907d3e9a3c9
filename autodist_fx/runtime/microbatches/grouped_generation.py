"""`GroupedGeneration`: the part of a rank's model that generates groups of rows in turns, on the driver.

Each group is a call of transformers' own generate, in a thread of its own, with a Leader and a cache of its own. The
other ranks do what they hear, in order, and know nothing of groups but that caches come and go.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import GenerationMixin

from autodist_fx.calls.lengths import Lengths
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.generation.call_programs import CallPrograms
from autodist_fx.runtime.generation.collective_call import CallCommunicator
from autodist_fx.runtime.generation.guarded_programs import GuardedPrograms
from autodist_fx.runtime.generation.leader import Leader
from autodist_fx.runtime.generation.step import Step
from autodist_fx.runtime.generation.step_channel import StepChannel
from autodist_fx.runtime.microbatches.announced import Announcements, InTurns, OneByOne
from autodist_fx.runtime.microbatches.bounded_sends import BoundedSends
from autodist_fx.runtime.microbatches.chunked_step import chunk_count, chunk_programs, chunks
from autodist_fx.runtime.microbatches.count import Microbatches, checked
from autodist_fx.runtime.microbatches.groups import group_count, groups_of, joined_sequences, main_input, why_whole
from autodist_fx.runtime.microbatches.in_flight import InFlight
from autodist_fx.runtime.microbatches.random_states import group_seeds, random_state, set_random_state
from autodist_fx.runtime.microbatches.turns import Turns
from cost_model.mesh import Mesh
from passes.program.rank_program import RankProgram

_GENERATE = frozenset(inspect.signature(GenerationMixin.generate).parameters)


class GroupedGeneration:
    """Takes part in DistributedCausalLM, whose attributes these are."""

    main_input_name: str
    config: Any
    communicator: CallCommunicator
    device: torch.device
    mesh: Mesh
    program: RankProgram
    in_flight: InFlight
    _leader: Leader | None
    _channel: StepChannel | None
    _call_programs: CallPrograms | None
    _finish_sends: Callable[[], None]
    _inputs: frozenset[str]
    _prepare_generation_config: Callable[..., Any]
    _asked: Microbatches | None = None  # by the call of generate that runs
    microbatches: Microbatches
    _programs_for: Callable[[Lengths], GuardedPrograms[Any]]
    _announce_preparing: Callable[[Lengths], None]
    run_variant: Callable[[Step, Any], torch.Tensor | None]

    def _chunked(self, step: Step, microbatches: Microbatches | None) -> list[tuple[Step, RankProgram]] | None:
        """Return the chunks of a step's tokens, and their programs; None where the step is run whole."""
        tokens, wanted = step.input_ids.shape[1], checked(microbatches, self._asked or self.microbatches)
        if tokens == 1 or wanted == 1 or self._why_one_stage() or step.encoded is not None or self.program.whole_steps:
            return None
        if self._leader is not None and not self._leader.is_alone:  # other groups keep the stages busy
            return None
        chosen = chunk_count(step, wanted, None if self._call_programs is None else self._call_programs.step_seconds)
        if chosen.count == 1:
            return None
        parts = chunks(step, chosen.count)

        def program_of(lengths: Lengths) -> object:
            programs = self._programs_for(lengths)
            return programs.known(lengths) if wanted == "auto" else programs.get(lengths, self._announce_preparing)

        programs = chunk_programs(step, parts, program_of)
        if programs is None:
            return None
        self.in_flight = chosen
        return list(zip(parts, programs, strict=True))

    def _run_chunks(self, parts: Sequence[tuple[Step, RankProgram]], *, cache_kept: bool) -> torch.Tensor | None:
        """Run the chunks of a step, which all ranks are told of at once; return the logits of the last."""
        sends, logits = BoundedSends(self.communicator), None
        if self._leader is not None:
            self._leader.announce_steps([part for part, _ in parts], cache_kept=cache_kept)
        for part, program in parts:
            if self._leader is None:
                sends.begin_action()
            logits = self.run_variant(part, program)
        return logits

    def _config_of(self, given: Mapping[str, Any]) -> GenerationConfig:
        """Return what generate's arguments come to."""
        others = {k: v for k, v in given.items() if k not in _GENERATE}
        config, _ = self._prepare_generation_config(given.get("generation_config"), **others)
        return config

    def _why_one_stage(self) -> str:
        """Return why no two steps are in flight at a time in this model, in words; "" where they may be."""
        return "one stage" if self.mesh.pp == 1 or self._channel is None else ""

    def _why_rows_stay(self) -> str:
        """Return why a batch's rows are to be generated together, in words; "" where they may be divided."""
        return self.program.rows.reason

    def _groups(self, given: Mapping[str, Any], wanted: Microbatches) -> Sequence[Mapping[str, Any]] | None:
        """Return the arguments of generate for each group of rows; None where the batch is generated whole."""
        why = self._why_one_stage() or ("as asked for" if wanted == 1 else "")
        if not why and _has_own_generate(type(self)):
            why = "this family has a generate of its own"
        if not why:
            config = self._config_of(given)
            why = self._why_rows_stay() or why_whole(given, config, self.main_input_name)
        if why:
            self.in_flight = InFlight(1, why)
        else:
            seconds = None if self._call_programs is None else self._call_programs.step_seconds
            self.in_flight = group_count(given, config, self.main_input_name, wanted, seconds)
        count = self.in_flight.count
        return None if count == 1 else groups_of(given, self.main_input_name, count)

    def _lead_groups(
        self, generate: Callable[..., Any], groups: Sequence[Mapping[str, Any]], whole: Mapping[str, Any]
    ) -> torch.Tensor:
        """Generate the groups of a batch, on the driver; return the sequences of all, which then all ranks have."""
        assert self._leader is not None
        config, prompt = self._config_of(whole), main_input(whole, self.main_input_name)
        if self.config.is_encoder_decoder:
            prompt = whole.get("decoder_input_ids")
        self._leader.begin_groups(1 if prompt is None else prompt.shape[1])
        found = self._in_turns(generate, groups, len(groups), sampled=bool(config.do_sample), divides=True)
        result = joined_sequences(found, config)
        self._leader.end(result)
        return result

    def _lead_many(
        self, generate: Callable[..., Any], batches: Sequence[Mapping[str, Any]], wanted: Microbatches
    ) -> list[torch.Tensor]:
        """Generate for each batch, on the driver, some in flight at a time; then all ranks have what comes of it."""
        self._leader = Leader(self._channel, OneByOne(self._finish_sends), self._inputs)
        try:
            configs = [self._config_of(given) for given in batches]
            for given, config in zip(batches, configs, strict=True):
                if (why := why_whole(given, config, self.main_input_name)) not in ("", "one row"):
                    raise AutodistError(f"generate_many generates batches one by one, and {why}: call generate")
            most = 1 if self._why_one_stage() else self.mesh.pp + 1 if wanted == "auto" else wanted
            self.in_flight = InFlight(most, "batches at a time")
            self._leader.begin_groups(0)
            found = self._in_turns(generate, batches, most, sampled=any(bool(c.do_sample) for c in configs))
            for sequences in found:
                self._leader.end(sequences)
            return found
        finally:
            self._leader = None

    def _in_turns(
        self,
        generate: Callable[..., Any],
        groups: Sequence[Mapping[str, Any]],
        most: int,
        *,
        sampled: bool,
        divides: bool = False,
    ) -> list[torch.Tensor]:
        """Generate for each group, `most` at a time, on the driver; with `sampled` each from a random state of its own.
        `divides`: they are rows of one batch."""
        outer, device = self._leader, self.device

        def save() -> tuple[Leader | None, Any]:
            return self._leader, random_state(device) if sampled else None

        def restore(state: tuple[Leader | None, Any]) -> None:
            self._leader = state[0]
            if sampled:
                set_random_state(state[1], device)

        turns: Turns[torch.Tensor] = Turns(most, save, restore)
        channel = self._channel
        announcements: Announcements = OneByOne(self._finish_sends)
        if channel is not None:
            announcements = InTurns(self.communicator, lambda: channel.sent, turns.hand_on)

        def group(given: Mapping[str, Any], seed: int | None) -> torch.Tensor:
            leader = self._leader = Leader(channel, announcements, self._inputs, divides_rows=divides)
            if seed is not None:
                torch.manual_seed(seed)
            sequences: torch.Tensor = generate(**given)
            leader.forget()
            return sequences

        seeds = group_seeds(len(groups)) if sampled else [None] * len(groups)
        before = random_state(device) if sampled else None
        try:
            return turns.run([functools.partial(group, g, s) for g, s in zip(groups, seeds, strict=True)])
        finally:
            restore((outer, before))


def _has_own_generate(kind: type) -> bool:
    """Return whether a family's class takes part that has a generate of its own."""
    own = next(c for c in kind.__mro__ if "generate" in c.__dict__ and not c.__module__.startswith("autodist_fx."))
    return own is not GenerationMixin
