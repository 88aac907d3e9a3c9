"""`DistributedSeq2SeqLM`: one rank's share of an encoder-decoder model, called and generating as the whole would.

As DistributedCausalLM, with a second program: the encoder's, which runs once for an input and leaves keys and values of
the cross-attentions on the ranks whose decoder layers read them. Its output goes to no other rank, and not to generate:
that gets a tensor of width 0, to count rows by.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.generation import GenerateBeamEncoderDecoderOutput, GenerateEncoderDecoderOutput, GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from autodist_fx.calls.lengths import Lengths, lengths_of
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.cache.cross_cache import CrossCache, Encoded
from autodist_fx.runtime.cache.kv_cache import SplitCache, encoder_view, local_cache
from autodist_fx.runtime.comm.channels import Channel
from autodist_fx.runtime.generation.causal_lm import DistributedCausalLM
from autodist_fx.runtime.generation.guarded_programs import GuardedPrograms, only
from autodist_fx.runtime.generation.step_messages import Command
from passes.program.rank_program import RankProgram

_DTYPES = (torch.long, torch.int32, torch.bool, torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MOST_DIMS = 4


class DistributedSeq2SeqLM(DistributedCausalLM):
    """What `adx.from_pretrained` gives for a model with an encoder and a decoder, on every rank.

    `encoder` is this rank's program for the encoder, with its parameters loaded; `ways` has both programs for other
    lengths, too; `main_input_name` is what the encoder reads.
    `skeleton`: the model on meta, for a generate of the family's own, which asks it for sizes.
    """

    _outputs = (GenerateEncoderDecoderOutput, GenerateBeamEncoderDecoderOutput)
    _names: Mapping[str, str] = {
        "input_ids": "decoder_input_ids",
        "attention_mask": "decoder_attention_mask",
        "position_ids": "decoder_position_ids",
    }
    _mask_name = "decoder_attention_mask"

    def __init__(
        self,
        program: RankProgram,
        *args: Any,
        encoder: RankProgram,
        main_input_name: str,
        skeleton: nn.Module | None = None,
        ways: GuardedPrograms[tuple[RankProgram, RankProgram]] | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(program, *args, **{"logits_on_every_rank": True, **keywords})
        self._ways = ways or only((encoder, program))
        object.__setattr__(self, "_skeleton", skeleton)  # no submodule: its parameters are on meta
        self.main_input_name = main_input_name
        self.encoder_program = encoder
        self.encoder_module = encoder.graph_module.eval()
        held = [*self.graph_module.parameters(), *self.encoder_module.parameters()]
        self.dtype = next((p.dtype for p in held if p.is_floating_point()), self.dtype)
        self._encoder = _Encoder(self)
        read = {*encoder.input_names, *program.input_names} - {"past_key_values", "cache_position"}
        self._encoder_inputs = tuple(sorted(read - set(self._names.values())))
        self._encoded: weakref.WeakValueDictionary[int, Encoded] = weakref.WeakValueDictionary()
        self._last_encoded: Encoded | None = None  # held while generating; else whoever asked for it does
        self._encoded_count = 0
        self._wants = 0  # number of what the encoder gave that the next step reads

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            skeleton = self.__dict__.get("_skeleton")
            if skeleton is None or name.startswith("_"):
                raise
            return getattr(skeleton, name)

    def get_encoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self._encoder

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.Tensor | None = None,
        encoder_outputs: EncoderOutput | None = None,
        past_key_values: SplitCache | None = None,
        cache_position: torch.Tensor | None = None,
        use_cache: bool | None = None,
        input_features: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Seq2SeqLMOutput:
        """One forward pass; called on every rank with the same arguments.

        Takes what the encoder reads (with its `attention_mask`), or the `encoder_outputs` of `get_encoder()`, or a
        cache that was used with them. `.logits` [batch, tokens, vocabulary] on every rank; while generating, of the
        last position, on the ranks of the last stage.
        """
        if decoder_input_ids is None:
            raise AutodistError("a distributed encoder-decoder model takes decoder_input_ids, and got none")
        given = {"input_ids": input_ids, "input_features": input_features, "input_values": input_values}
        if encoder_outputs is None and given.get(self.main_input_name) is not None:
            known = past_key_values is not None and past_key_values.tokens
            if not known:
                encoder_outputs = self._encoder(
                    **{self.main_input_name: given[self.main_input_name]}, attention_mask=attention_mask
                )
        if encoder_outputs is not None:
            self._wants = encoder_outputs.encoded.number
        elif isinstance(past_key_values, CrossCache) and past_key_values.encoded is not None:
            self._wants = past_key_values.encoded.number
        else:
            raise AutodistError(
                f"there is nothing for the decoder to read: give {self.main_input_name}, encoder_outputs, or a cache"
            )
        found = super().forward(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            position_ids=decoder_position_ids,
            past_key_values=past_key_values,
            cache_position=cache_position,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        return Seq2SeqLMOutput(logits=found.logits, past_key_values=found.past_key_values)

    # ------------------------------------------------------------------------------------------- in generate

    @staticmethod
    def _prompt(given: Mapping[str, Any]) -> torch.Tensor | None:
        return None  # generate's inputs are the encoder's

    def _drive(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._drive(*args, **kwargs)
        finally:
            self._last_encoded = None

    def _follow(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._follow(*args, **kwargs)
        finally:
            self._last_encoded = None

    def _prepare_decoder_input_ids_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """With a mask, which then grows with the tokens, a column a step."""
        ids, model_kwargs = super()._prepare_decoder_input_ids_for_generation(*args, **kwargs)
        if model_kwargs.get("decoder_attention_mask") is None:
            model_kwargs["decoder_attention_mask"] = torch.ones_like(ids)
        return ids, model_kwargs

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        past_key_values: SplitCache | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        cache_position: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The encoder's mask needs not be handed on: it is noted with what the encoder gave."""
        if "decoder_position_ids" in kwargs:
            kwargs["position_ids"] = kwargs.pop("decoder_position_ids")
        found = super().prepare_inputs_for_generation(
            input_ids, past_key_values, decoder_attention_mask, cache_position, **kwargs
        )
        named = {self._names.get(name, name): value for name, value in found.items()}
        taken = inspect.signature(self.forward).parameters
        return {name: v for name, v in named.items() if name in taken} | {"encoder_outputs": encoder_outputs}

    def _further_numbers(self) -> tuple[int, ...]:
        return (self._wants,)

    def _follow_step(self, cache: SplitCache, numbers: list[int], payload: torch.Tensor) -> torch.Tensor:
        self._wants = numbers[6]
        return super()._follow_step(cache, numbers, payload)

    def _run(self, cache: SplitCache, input_ids: torch.Tensor, *args: Any) -> torch.Tensor | None:
        assert isinstance(cache, CrossCache)
        cache.attach(self._encoded[self._wants], input_ids.shape[0])
        return super()._run(cache, input_ids, *args)

    def _lengths(self, cache: SplitCache, input_ids: torch.Tensor) -> Lengths:
        return {**super()._lengths(cache, input_ids), **self._encoded[self._wants].lengths}

    def _program_for(self, lengths: Lengths) -> RankProgram:
        program: RankProgram = self._ways.get(lengths)[1]
        return program

    def _further_inputs(self, cache: SplitCache) -> dict[str, Any]:
        return dict(cache.inputs) if isinstance(cache, CrossCache) else {}

    def _empty_cache(self) -> SplitCache:
        cache = local_cache(self.config, self.program, CrossCache)
        cache.kinds, cache.numbers, cache.inputs = self.program.cache_kinds, self.program.cache_layers, {}
        return cache

    # ------------------------------------------------------------------------------------------- the encoder

    def encode(self, inputs: Mapping[str, torch.Tensor | None]) -> EncoderOutput:
        """Run the encoder, on all ranks; called on the driver alone while it generates."""
        rows, length = self._main_input(inputs).shape[:2]
        if inputs.get("attention_mask") is None:
            inputs = {**inputs, "attention_mask": torch.ones(rows, length, dtype=torch.long)}
        # in the order in which the others receive them
        given = {name: value for name in self._encoder_inputs if (value := inputs.get(name)) is not None}
        given = {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in given.items()}
        self._prepare(self._ways, self._read(given))
        number = self._encoded_count + 1
        if self._generating and self._channel is not None:
            self._finish_sends()
            header = [_described(given.get(name)) for name in self._encoder_inputs]
            self._channel.say(Command.ENCODE, (number,), [torch.tensor(header)])
            for rank in self._others:
                for value in given.values():
                    self.communicator.send(value.contiguous(), rank, Channel.ENCODER_INPUTS)
        return EncoderOutput.of(self._encode(number, given), rows, length, self.device)

    def _read(self, given: Mapping[str, torch.Tensor]) -> Lengths:
        """The lengths of what the encoder reads."""
        return {k: n for k, n in lengths_of(self._ways.forms, given, 0).items() if k != "P"}

    def _main_input(self, inputs: Mapping[str, torch.Tensor | None]) -> torch.Tensor:
        value = inputs.get(self.main_input_name)
        if value is None:
            raise AutodistError(f"the encoder of this model reads {self.main_input_name}, and got none")
        return value

    def _follow_encode(self, numbers: list[int], payload: torch.Tensor) -> None:
        given = {}
        for name, (dtype, *shape) in zip(self._encoder_inputs, payload.view(-1, 1 + _MOST_DIMS).tolist(), strict=True):
            if dtype >= 0:
                sizes = tuple(size for size in shape if size >= 0)
                given[name] = self.communicator.recv(
                    sizes, _DTYPES[dtype], self.device, self.driver, Channel.ENCODER_INPUTS
                )
        self._last_encoded = self._encode(numbers[0], given)

    def _encode(self, number: int, given: Mapping[str, torch.Tensor]) -> Encoded:
        self._encoded_count = number
        given = {name: value.to(self.device) for name, value in given.items()}
        scratch = self._empty_cache()
        lengths = self._read(given)
        encoder = self._ways.get(lengths)[0]
        view = encoder_view(scratch, self.program, encoder)
        inputs = {**given, "past_key_values": view}
        self._call(encoder, {name: inputs[name] for name in encoder.input_names})
        layers = dict(zip(encoder.cache_layers, view.layers, strict=True))
        kept = {name: value for name, value in given.items() if name in self.program.input_names}
        rows = next(iter(given.values())).shape[0]
        read = {"E": lengths["E"]} if "E" in lengths else {}
        encoded = self._encoded[number] = Encoded(number, rows, layers, read, kept)
        if self._generating:
            self._last_encoded = encoded
        return encoded


class EncoderOutput(BaseModelOutput):
    """What generate is given for an encoder's output: rows and tokens to count, and where the ranks have the rest."""

    encoded: Encoded

    @classmethod
    def of(cls, encoded: Encoded, rows: int, length: int, device: torch.device) -> EncoderOutput:
        output = cls(last_hidden_state=torch.empty(rows, length, 0, device=device))
        output.encoded = encoded
        return output


class _Encoder(nn.Module):
    """Stands for the encoder where transformers asks for one."""

    def __init__(self, model: DistributedSeq2SeqLM) -> None:
        super().__init__()
        self._model = weakref.ref(model)

    @property
    def main_input_name(self) -> str:
        return self._whole.main_input_name

    @property
    def _whole(self) -> DistributedSeq2SeqLM:
        model = self._model()
        assert model is not None
        return model

    def forward(self, **kwargs: Any) -> EncoderOutput:  # under this name generate hands on all that it has
        if kwargs.get("output_attentions") or kwargs.get("output_hidden_states"):
            raise AutodistError("the ranks' graphs give neither attentions nor hidden states: ask the model itself")
        return self._whole.encode(kwargs)


def _described(value: torch.Tensor | None) -> list[int]:
    """[number of the dtype, sizes], padded with -1; all of it -1 for an input that is not given."""
    if value is None:
        return [-1] * (1 + _MOST_DIMS)
    return [_DTYPES.index(value.dtype), *value.shape, *[-1] * (_MOST_DIMS - value.dim())]


def seq2seq_class(model_class: type[nn.Module]) -> type[DistributedSeq2SeqLM]:
    """DistributedSeq2SeqLM, with the generate of a model class that has its own (of long recordings, say)."""
    own = next(cls for cls in model_class.__mro__ if "generate" in cls.__dict__)
    if own is GenerationMixin:
        return DistributedSeq2SeqLM
    if issubclass(own, nn.Module):
        raise AutodistError(f"{own.__name__} has a generate of its own, which is for one process: call forward instead")
    return type(f"Distributed{model_class.__name__}", (DistributedSeq2SeqLM, own), {})
