"""`Follower`: one call of generate on every rank but the driver.

Who calls it, in a follower's process: `DistributedCausalLM.generate`, which returns what `follow` returns. No loop of
transformers' runs here. The messages of leader.py say what to do, in the order in which the driver does it, so that the
programs of all ranks meet in their collectives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from autodist_fx.calls.cache_names import CACHE_FIELD
from autodist_fx.calls.lengths import Lengths
from autodist_fx.errors import AutodistError, CommunicationError
from autodist_fx.runtime.cache.cache_table import CacheTable
from autodist_fx.runtime.cache.cross_cache import Encoded
from autodist_fx.runtime.cache.kv_cache import SplitCache
from autodist_fx.runtime.comm.channels import Channel
from autodist_fx.runtime.generation.step import Step
from autodist_fx.runtime.generation.step_channel import StepChannel
from autodist_fx.runtime.generation.step_messages import (
    CropMessage,
    EncodeMessage,
    EndMessage,
    ForgetMessage,
    GroupsMessage,
    InputsMessage,
    OutputKind,
    PrepareMessage,
    ReorderMessage,
    StepMessage,
)
from autodist_fx.runtime.microbatches.bounded_sends import BoundedSends


class FollowingModel(Protocol):
    """The methods of a rank's model that a follower calls."""

    caches: CacheTable

    def run_step(self, step: Step) -> torch.Tensor | None:
        """Run the program that the guards choose for `step`."""

    def prepare(self, lengths: Lengths) -> None:
        """Make the program for these lengths, together with all ranks. Raises AutodistError."""

    def follow_encoding(self, message: EncodeMessage) -> Encoded:
        """Receive what the encoder reads, and run it."""

    def encoded_of(self, number: int) -> Encoded | None:
        """Return what the encoder gave under that number; None for 0."""


class Follower:
    """Does what the leader says, for one generation. `outputs` are transformers' classes of an output of sampling
    and of beam search; `prompt` is what a streamer gets first (None: the input_ids of the first step)."""

    def __init__(
        self,
        model: FollowingModel,
        channel: StepChannel,
        outputs: Sequence[type],
        *,
        streamer: Any = None,
        prompt: torch.Tensor | None = None,
    ) -> None:
        self._model, self._channel, self._outputs = model, channel, outputs
        self._streamer, self._prompt, self._prompt_streamed = streamer, prompt, False
        self._kept: dict[int, SplitCache] = {}  # alive until the end: a logits processor may have one of its own
        self._encoded: dict[int, Encoded] = {}  # alive as long as the leader's
        self._streams_at_end: int | None = None  # columns of the prompt, where rows are generated in groups
        self._further: dict[str, torch.Tensor] = {}  # inputs of the step that comes, beside tokens

    def follow(self, sends: BoundedSends) -> Any:
        """Do what the leader says until it says that this is the end; return the same result as on the driver.
        `sends` are those of this rank's programs. What the leader raises, ends the waits here (collective_call.py)."""
        while True:
            match self._channel.hear():
                case StepMessage() as message:
                    sends.begin_action()
                    self._step(message)
                case ReorderMessage() as message:
                    self._model.caches.numbered(message.cache).reorder_cache(message.rows)
                case CropMessage() as message:
                    self._model.caches.numbered(message.cache).crop(message.argument)
                case InputsMessage() as message:
                    self._further = {
                        name: self._channel.receive(spec, Channel.STEP_INPUTS) for name, spec in message.inputs
                    }
                case EncodeMessage() as message:
                    sends.begin_action()
                    if self._streams_at_end is None:
                        self._encoded.clear()
                    self._encoded[message.encoded] = self._model.follow_encoding(message)
                case GroupsMessage() as message:
                    self._streams_at_end = message.prompt_tokens
                case ForgetMessage() as message:
                    self._kept.pop(message.cache, None)
                    self._encoded.pop(message.encoded, None)
                case PrepareMessage() as message:
                    with contextlib.suppress(AutodistError):  # the leader has the same, and says it
                        self._model.prepare(message.lengths)
                case EndMessage() as message:
                    return self._end(message)
                case message:
                    raise CommunicationError(f"a follower does not know what to do with a {type(message).__name__}")

    def _step(self, message: StepMessage) -> None:
        cache = self._model.caches.numbered(message.cache)
        if message.cache_kept:
            self._kept[cache.number] = cache
        first, (batch, tokens) = message.first_position, message.input_ids.shape
        if message.attention_mask is not None:
            cache.mask = message.attention_mask
        elif message.mask_of_ones:
            cache.mask = message.input_ids.new_ones(batch, cache.tokens + tokens)
        elif message.mask_grown:
            if cache.mask is None:
                raise CommunicationError(f"the mask of cache {cache.number} grows, and was never sent")
            cache.mask = torch.cat([cache.mask, cache.mask.new_ones(cache.mask.shape[0], 1)], dim=-1)
        step = Step(
            cache=cache,
            input_ids=message.input_ids,
            attention_mask=cache.mask,
            position_ids=message.position_ids,
            cache_position=torch.arange(first, first + tokens, device=message.input_ids.device),
            encoded=self._model.encoded_of(message.encoded),
            further=self._further,
        )
        self._further = {}
        self._model.run_step(step)
        self._stream(message.input_ids, new=message.new_tokens)

    def _stream(self, input_ids: torch.Tensor, *, new: bool) -> None:
        if self._streamer is None or self._streams_at_end is not None:
            return
        if not self._prompt_streamed:
            self._streamer.put((input_ids if self._prompt is None else self._prompt).cpu())
            self._prompt_streamed = True
        if new:
            self._streamer.put(input_ids[:, -1].cpu())

    def _end(self, message: EndMessage) -> Any:
        sequences = message.sequences
        if self._streamer is not None:
            columns = [sequences[:, -1]]
            if (prompt := self._streams_at_end) is not None:
                self._streamer.put(sequences[:, :prompt].cpu())
                columns = list(sequences[:, prompt:].unbind(1))
            for column in columns:
                self._streamer.put(column.cpu())
            self._streamer.end()
        if message.kind is OutputKind.SEQUENCES:
            return sequences
        output = self._outputs[message.kind - OutputKind.SAMPLE]
        return output(sequences=sequences, **{CACHE_FIELD: self._model.caches.get(message.cache)})
