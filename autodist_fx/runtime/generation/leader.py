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
    InputsMessage,
    Message,
    OutputKind,
    PrepareMessage,
    ReorderMessage,
    StepMessage,
    TensorSpec,
)


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
    """Leads one generation. `channel` goes to all other ranks, None where there are none; `finish_sends` lets go of
    what was sent; `inputs` are what the graphs of any rank take, by the decoder's plain names."""

    def __init__(
        self, channel: StepChannel | None, finish_sends: Callable[[], None], inputs: frozenset[str]
    ) -> None:
        self._channel, self._finish_sends = channel, finish_sends
        self._takes_positions, self._takes_mask = "position_ids" in inputs, "attention_mask" in inputs
        self.mask = GrowingMask()
        self._chosen = False  # tokens, since the last step of transformers' loop
        self._new_tokens = False  # the step that comes has them
        self.encoded: Encoded | None = None  # what the encoder gave last, held until the end

    def lead(self, generate: Callable[[], Any]) -> Any:
        """Return what transformers' `generate` returns, which then all ranks have."""
        result = generate()
        self._say(self._end(result))
        self._finish_sends()
        return result

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

    def announce_step(self, step: Step, *, cache_kept: bool) -> None:
        """Announce a step before the driver runs it. Raises AutodistError on a mask that is not [batch, tokens]."""
        if self._channel is None:
            return
        mask, cache, grown = step.attention_mask, step.cache, False
        assert mask is not None
        if self._takes_mask:
            if mask.dim() != 2:
                raise AutodistError(f"attention_mask must be [batch, tokens]; got {list(mask.shape)}")
            grown = self.mask.is_grown(mask) and cache.mask_tokens == mask.shape[1] - 1
            cache.mask_tokens = mask.shape[1]
        self._announce_further(step)
        told = self._takes_mask and not grown and not step.shows_all
        new_tokens, self._new_tokens = self._new_tokens, False
        self._finish_sends()
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
            self._finish_sends()
            specs = ((name, TensorSpec(value.dtype, tuple(value.shape))) for name, value in step.further.items())
            self._say(InputsMessage(tuple(specs)))
            for value in step.further.values():
                self._channel.send(value, Channel.STEP_INPUTS)

    def announce_preparing(self, lengths: Lengths) -> None:
        """Announce that all ranks are to make a program for these sizes, which they do together."""
        self._finish_sends()
        self._say(PrepareMessage(lengths))

    def announce_encoding(self, encoded: int, inputs: Sequence[torch.Tensor | None]) -> None:
        """Announce that the encoder runs on `inputs`, None for what it is not given; they are sent, too. `encoded`
        is the number of what it will give."""
        if self._channel is None:
            return
        self._finish_sends()
        specs = (None if value is None else TensorSpec(value.dtype, tuple(value.shape)) for value in inputs)
        self._say(EncodeMessage(encoded, tuple(specs)))
        for value in inputs:
            if value is not None:
                self._channel.send(value, Channel.ENCODER_INPUTS)

    def announce_cache_change(self, what: str, cache: SplitCache, numbers: torch.Tensor) -> None:
        """Announce a change of a cache: `what` is "reorder", with rows, or "crop", with one length."""
        if what == "reorder":
            self._say(ReorderMessage(cache.number, numbers.long()))
        else:
            self._say(CropMessage(cache.number, int(numbers)))

    def _say(self, message: Message) -> None:
        if self._channel is not None:
            self._channel.say(message)
