"""`Leader`: one call of generate on the driver, the first rank of the last stage, which alone has it from transformers.

Who calls what, all in the driver's process: `DistributedCausalLM.generate` makes a Leader and calls `lead`, in which
transformers' own loop runs. That loop calls `DistributedCausalLM.forward`, which announces the step here before it runs
the rank's own program, and the cache's methods, whose changes are announced too. The other ranks hear all of it in
follower.py. On a mesh of one rank there is nobody to tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from autodist_fx.calls.cache_names import cache_of
from autodist_fx.calls.lengths import Lengths
from autodist_fx.errors import AutodistError
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
    Message,
    OutputKind,
    PrepareMessage,
    ReorderMessage,
    StepMessage,
    TensorSpec,
)
from autodist_fx.runtime.microbatches.announced import Announcements, OneByOne


class GrowingMask:
    """The attention mask between two steps of one generation: in most, it is the last one's and a column of ones."""

    def __init__(self) -> None:
        self._grown: torch.Tensor | None = None  # by transformers, after the last step
        self._next_positions: torch.Tensor | None = None  # int64 [batch, 1]: tokens that the last step's mask shows

    def grow(self, mask: torch.Tensor | None) -> None:
        """Take note of `mask` [batch, tokens], the last step's with a column of ones."""
        self._grown = mask

    def is_grown(self, mask: torch.Tensor) -> bool:
        """Return whether this very tensor is the one that grew."""
        return mask is self._grown

    def positions(self, mask: torch.Tensor, *, cached: bool) -> torch.Tensor:
        """Return the position_ids of a step with this mask: each row counted from its first token that is no
        padding. int64 [batch, tokens of the mask], or [batch, 1] where the earlier ones are `cached` and known."""
        if cached and self.is_grown(mask) and self._next_positions is not None:
            positions, self._next_positions = self._next_positions, self._next_positions + 1
            return positions
        seen = mask.long().cumsum(-1)
        self._next_positions = seen[:, -1:]
        return (seen - 1).masked_fill_(mask == 0, 1)


class Leader:
    """Leads one generation. `channel` goes to all other ranks, None where there are none; `announcements` lets go of
    what was sent; `inputs` are what the graphs of any rank take, by the decoder's plain names. `divides_rows`: it
    generates some of a batch's rows, by graphs that compute each row by itself."""

    def __init__(
        self,
        channel: StepChannel | None,
        announcements: Announcements,
        inputs: frozenset[str],
        *,
        divides_rows: bool = False,
    ) -> None:
        self.divides_rows = divides_rows
        self._channel, self._announcements = channel, announcements
        self._caches: set[int] = set()  # numbers of those that others keep for it
        self._takes_positions, self._takes_mask = "position_ids" in inputs, "attention_mask" in inputs
        self.mask = GrowingMask()
        self._chosen = False  # tokens, since the last step of transformers' loop
        self._new_tokens = False  # the step that comes has them
        self.encoded: Encoded | None = None  # what the encoder gave last, held until the end

    def lead(self, generate: Callable[[], Any]) -> Any:
        """Return what transformers' `generate` returns, which then all ranks have."""
        result = generate()
        self.end(result)
        return result

    def end(self, result: Any) -> None:
        """Say that this is the end, and what it has come to."""
        self._say(self._end(result))
        self._announcements.begin()

    def begin_groups(self, prompt_tokens: int) -> None:
        """Say that rows are generated in groups, after a prompt of so many columns."""
        self._announcements.begin()
        self._say(GroupsMessage(prompt_tokens))

    def forget(self) -> None:
        """Say that what was kept for this generation goes, since a group of rows has ended."""
        encoded, self.encoded = 0 if self.encoded is None else self.encoded.number, None
        for cache in sorted(self._caches) or ([0] if encoded else []):
            self._say(ForgetMessage(cache, encoded))
        self._caches.clear()

    @staticmethod
    def _end(result: Any) -> EndMessage:
        if isinstance(result, torch.Tensor):
            return EndMessage(OutputKind.SEQUENCES, result)
        kind = OutputKind.BEAMS if "Beam" in type(result).__name__ else OutputKind.SAMPLE
        cache = cache_of(result)
        return EndMessage(kind, result["sequences"], 0 if cache is None else cache.number)

    def choose_tokens(self, mask: torch.Tensor | None) -> None:
        """Take note that transformers' loop chooses tokens of a step's logits next. `mask`: see GrowingMask.grow."""
        self.mask.grow(mask)
        self._chosen = True

    def prepare_step(self) -> None:
        """Take note that a step of transformers' loop comes next; other calls (a processor's, say) choose none."""
        self._new_tokens, self._chosen = self._chosen, False

    @property
    def is_alone(self) -> bool:
        """Return whether no other generation is in flight beside this one."""
        return isinstance(self._announcements, OneByOne)

    def announce_steps(self, steps: Sequence[Step], *, cache_kept: bool) -> None:
        """Announce steps before the driver runs the first of them: one, or the chunks of one. Raises AutodistError on a
        mask that is not [batch, tokens]."""
        if self._channel is None:
            return
        self._announcements.begin()
        for step in steps:
            self._announce(step, cache_kept=cache_kept, is_last=step is steps[-1])
        self._announcements.end()

    def _announce(self, step: Step, *, cache_kept: bool, is_last: bool) -> None:
        mask, cache, grown = step.attention_mask, step.cache, False
        assert mask is not None
        if self._takes_mask:
            if mask.dim() != 2:
                raise AutodistError(f"attention_mask must be [batch, tokens]; got {list(mask.shape)}")
            grown = self.mask.is_grown(mask) and cache.mask_tokens == mask.shape[1] - 1
            cache.mask_tokens = mask.shape[1]
        if cache_kept:
            self._caches.add(cache.number)
        self._announce_further(step)
        told = self._takes_mask and not grown and not step.shows_all
        new_tokens = self._new_tokens and is_last
        self._new_tokens = self._new_tokens and not is_last
        self._say(
            StepMessage(
                cache=cache.number,
                first_position=int(step.cache_position[0]),
                input_ids=step.input_ids,
                position_ids=step.position_ids if self._takes_positions else None,
                attention_mask=mask.long() if told else None,
                mask_grown=grown,
                mask_of_ones=self._takes_mask and step.shows_all,
                new_tokens=new_tokens,
                cache_kept=cache_kept,
                encoded=0 if step.encoded is None else step.encoded.number,
            )
        )

    def _announce_further(self, step: Step) -> None:
        """Announce the inputs that no usual step has, and send them."""
        if step.further and self._channel is not None:
            specs = ((name, TensorSpec(value.dtype, tuple(value.shape))) for name, value in step.further.items())
            self._say(InputsMessage(tuple(specs)))
            for value in step.further.values():
                self._channel.send(value, Channel.STEP_INPUTS)

    def announce_preparing(self, lengths: Lengths) -> None:
        """Announce that all ranks are to make a program for these sizes, which they do together."""
        self._announcements.begin()
        self._say(PrepareMessage(lengths))
        self._announcements.end()

    def announce_encoding(self, encoded: int, inputs: Sequence[torch.Tensor | None]) -> None:
        """Announce that the encoder runs on `inputs`, None for what it is not given; they are sent, too. `encoded`
        is the number of what it will give."""
        if self._channel is None:
            return
        self._announcements.begin()
        specs = (None if value is None else TensorSpec(value.dtype, tuple(value.shape)) for value in inputs)
        self._say(EncodeMessage(encoded, tuple(specs)))
        for value in inputs:
            if value is not None:
                self._channel.send(value, Channel.ENCODER_INPUTS)
        self._announcements.end()

    def announce_cache_change(self, what: str, cache: SplitCache, numbers: torch.Tensor) -> None:
        """Announce a change of a cache: `what` is "reorder", with rows, or "crop", with one length."""
        if what == "reorder":
            self._say(ReorderMessage(cache.number, numbers.long()))
        else:
            self._say(CropMessage(cache.number, int(numbers)))

    def _say(self, message: Message) -> None:
        if self._channel is not None:
            self._channel.say(message)
