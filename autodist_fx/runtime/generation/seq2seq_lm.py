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
from transformers.modeling_outputs import Seq2SeqLMOutput

from autodist_fx.calls.cache_names import CACHE_FIELD, cache_of
from autodist_fx.calls.call import read_call
from autodist_fx.calls.lengths import Lengths, lengths_of
from autodist_fx.errors import AutodistError, CommunicationError
from autodist_fx.runtime.cache.cross_cache import CrossCache, Encoded
from autodist_fx.runtime.cache.kv_cache import SplitCache, encoder_view, local_cache
from autodist_fx.runtime.comm.channels import Channel
from autodist_fx.runtime.generation.causal_lm import (
    DistributedCausalLM,
    either_cache,
    refuse_inner_outputs,
    refuse_keywords,
)
from autodist_fx.runtime.generation.collective_call import collective
from autodist_fx.runtime.generation.encoder_output import EncoderOutput, EncoderStandIn
from autodist_fx.runtime.generation.guarded_programs import GuardedPrograms
from autodist_fx.runtime.generation.step import Step
from autodist_fx.runtime.generation.step_messages import EncodeMessage
from autodist_fx.runtime.generation.step_runner import RunnerParts
from autodist_fx.runtime.microbatches.count import Microbatches
from passes.program.rank_program import RankProgram


class DistributedSeq2SeqLM(DistributedCausalLM):
    """The model that `adx.from_pretrained` gives for an encoder and a decoder, on every rank.

    `programs` has pairs of this rank's programs for the encoder and the decoder; the first encoder's is `encoder`, with
    its parameters loaded. `main_input_name` is what the encoder reads.
    `skeleton`: the model on meta, for a generate of the family's own, which asks it for sizes.
    """

    _outputs = (GenerateEncoderDecoderOutput, GenerateBeamEncoderDecoderOutput)
    _names: Mapping[str, str] = {
        "input_ids": "decoder_input_ids",
        "attention_mask": "decoder_attention_mask",
        "position_ids": "decoder_position_ids",
    }
    _mask_name = "decoder_attention_mask"
    logits_on_every_rank = True

    def __init__(
        self,
        parts: RunnerParts,
        programs: GuardedPrograms[tuple[RankProgram, RankProgram]],
        *,
        encoder: RankProgram,
        main_input_name: str,
        skeleton: nn.Module | None = None,
    ) -> None:
        super().__init__(parts, programs)
        object.__setattr__(self, "_skeleton", skeleton)  # no submodule: its parameters are on meta
        self.main_input_name = main_input_name
        self.encoder_program = encoder
        self.encoder_module = encoder.graph_module.eval()
        held = [*self.graph_module.parameters(), *self.encoder_module.parameters()]
        self.dtype = next((p.dtype for p in held if p.is_floating_point()), self.dtype)
        self._encoder = EncoderStandIn(self)
        read = {*encoder.input_names, *parts.program.input_names} - {"past_key_values", "cache_position"}
        self._encoder_inputs = tuple(sorted(read - set(self._names.values())))
        self._encoded: weakref.WeakValueDictionary[int, Encoded] = weakref.WeakValueDictionary()
        self._encoded_count = 0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            skeleton = self.__dict__.get("_skeleton")
            if skeleton is None or name.startswith("_"):
                raise
            return getattr(skeleton, name)

    def _why_rows_stay(self) -> str:
        return self.encoder_program.rows.reason or super()._why_rows_stay()

    def get_encoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Return the stand-in that runs the encoder on all ranks."""
        return self._encoder

    @collective
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        *others: Any,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: SplitCache | None = None,
        cache: SplitCache | None = None,
        cache_position: torch.Tensor | None = None,
        use_cache: bool | None = None,
        input_features: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        microbatches: Microbatches | None = None,
        **keywords: Any,
    ) -> Any:
        """Run one forward pass; called on every rank with the same arguments.

        Takes what the model's own forward takes (`others`: by position) and returns what that returns, on every rank. A
        call unlike those before is compiled first.

        With `use_cache`, a cache that was used before, or the `encoder_outputs` of `get_encoder()`, a cache is filled,
        and nothing is taken but what the encoder reads, with its `attention_mask`, and the decoder's tokens, mask and
        positions. While generating `.logits` are those of the last position, on the ranks of the last stage.

        Raises AutodistError, which names the argument, where there is no such program.
        """
        past_key_values = either_cache(past_key_values, cache)
        if self._leader is None and self._call_programs is not None:
            named = {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "decoder_input_ids": decoder_input_ids,
                "decoder_attention_mask": decoder_attention_mask,
                "decoder_position_ids": decoder_position_ids,
                "encoder_outputs": encoder_outputs,
                "past_key_values": past_key_values,
                "cache_position": cache_position,
                "use_cache": use_cache,
                "input_features": input_features,
                "input_values": input_values,
                "output_attentions": output_attentions,
                "output_hidden_states": output_hidden_states,
                "return_dict": return_dict,
            }
            given = self._given(others, {**named, **keywords})
            if isinstance(given.get("encoder_outputs"), EncoderOutput):
                encoder_outputs = given.pop("encoder_outputs")
                given.setdefault("past_key_values", None)  # the encoder has filled a cache
            call = read_call(self._call_programs.signature, given, {})
            if not call.use_cache:
                return self._run_call(self._call_programs, call, microbatches)
            decoders = (*self._names.values(), "cache_position")
            self._refuse_with_cache(call, (*self._encoder_inputs, self.main_input_name, "attention_mask", *decoders))
            get = call.tensors.get
            input_ids, input_features, input_values = get("input_ids"), get("input_features"), get("input_values")
            attention_mask, decoder_input_ids = get("attention_mask"), get("decoder_input_ids")
            decoder_attention_mask, decoder_position_ids = get("decoder_attention_mask"), get("decoder_position_ids")
            past_key_values, cache_position = call.cache, get("cache_position")
        elif keywords:
            refuse_keywords(keywords)
        refuse_inner_outputs(output_attentions, output_hidden_states)
        if decoder_input_ids is None:
            raise AutodistError("a distributed encoder-decoder model takes decoder_input_ids, and got none")
        if encoder_outputs is None and not (past_key_values is not None and past_key_values.tokens):
            given = {"input_ids": input_ids, "input_features": input_features, "input_values": input_values}
            if (main_input := given.get(self.main_input_name)) is not None:
                encoder_outputs = self._encoder(**{self.main_input_name: main_input}, attention_mask=attention_mask)
        if encoder_outputs is not None:
            encoded = encoder_outputs.encoded
        elif isinstance(past_key_values, CrossCache) and past_key_values.encoded is not None:
            encoded = past_key_values.encoded
        else:
            raise AutodistError(
                f"there is nothing for the decoder to read: give {self.main_input_name}, encoder_outputs, or a cache"
            )
        found = self._forward(
            decoder_input_ids,
            decoder_attention_mask,
            decoder_position_ids,
            past_key_values,
            cache_position,
            use_cache,
            encoded,
        )
        output = Seq2SeqLMOutput(logits=found.logits, **{CACHE_FIELD: cache_of(found)})
        return output.to_tuple() if return_dict is False else output

    # ------------------------------------------------------------------------------------------- in generate

    @staticmethod
    def _prompt(given: Mapping[str, Any]) -> torch.Tensor | None:
        return None  # generate's inputs are the encoder's

    def _prepare_decoder_input_ids_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Return the decoder's first tokens, with a mask, which then grows with the tokens, a column a step."""
        ids, model_kwargs = super()._prepare_decoder_input_ids_for_generation(*args, **kwargs)
        if model_kwargs.get("decoder_attention_mask") is None:
            model_kwargs["decoder_attention_mask"] = torch.ones_like(ids)
        return ids, model_kwargs

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: torch.Tensor, *, encoder_outputs: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return a step's inputs. The encoder's mask needs not be handed on: it is noted with what the encoder gave."""
        kwargs["attention_mask"] = kwargs.pop("decoder_attention_mask", None)
        if "decoder_position_ids" in kwargs:
            kwargs["position_ids"] = kwargs.pop("decoder_position_ids")
        found = super().prepare_inputs_for_generation(input_ids, **kwargs)
        named = {self._names.get(name, name): value for name, value in found.items()}
        taken = inspect.signature(self.forward).parameters
        return {name: v for name, v in named.items() if name in taken} | {"encoder_outputs": encoder_outputs}

    # -------------------------------------------------------------------------------------------- on every rank

    def run_variant(self, step: Step, variant: tuple[RankProgram, RankProgram]) -> torch.Tensor | None:
        """Run the decoder's program of a (encoder, decoder) pair for a step."""
        _, decoder = variant
        assert isinstance(step.cache, CrossCache) and step.encoded is not None
        step.cache.attach(step.encoded, step.input_ids.shape[0])
        return self._run_program(decoder, step, step.cache.inputs)

    def empty_cache(self) -> SplitCache:
        """Return a cache of this rank's layers, the decoder's own and those that the encoder fills."""
        cache = local_cache(self.config, self.program, CrossCache)
        cache.kinds = (*self.program.cache_kinds, *self.program.length_kinds)
        cache.numbers, cache.inputs = self.program.cache_layers, {}
        return cache

    @collective
    def encode(self, inputs: Mapping[str, torch.Tensor | None]) -> EncoderOutput:
        """Run the encoder, on all ranks; called on the driver alone while it generates."""
        rows, length = self._main_input(inputs).shape[:2]
        if inputs.get("attention_mask") is None:
            inputs = {**inputs, "attention_mask": torch.ones(rows, length, dtype=torch.long)}
        given = {name: value for name in self._encoder_inputs if (value := inputs.get(name)) is not None}
        given = {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in given.items()}
        lengths = self._read(given)
        encoder, _ = self._programs.get(lengths, self._announce_preparing)
        number = self._encoded_count = self._encoded_count + 1
        if self._leader is not None:
            self._leader.announce_encoding(number, [given.get(name) for name in self._encoder_inputs])
        encoded = self._encode(number, given, lengths, encoder)
        if self._leader is not None:
            self._leader.encoded = encoded
        return EncoderOutput.of(encoded, rows, length, self.device)

    def _read(self, given: Mapping[str, torch.Tensor]) -> Lengths:
        """Return the sizes of what the encoder reads."""
        return {k: n for k, n in lengths_of(self._programs.specs, given, 0).items() if k != "P"}

    def _main_input(self, inputs: Mapping[str, torch.Tensor | None]) -> torch.Tensor:
        value = inputs.get(self.main_input_name)
        if value is None:
            raise AutodistError(f"the encoder of this model reads {self.main_input_name}, and got none")
        return value

    def follow_encoding(self, message: EncodeMessage) -> Encoded:
        """Receive what the encoder reads, and run it."""
        assert self._channel is not None
        if len(message.inputs) != len(self._encoder_inputs):
            raise CommunicationError(
                f"the driver's encoder reads {len(message.inputs)} inputs, that of rank {self.rank} reads "
                f"{', '.join(self._encoder_inputs)}"
            )
        given = {
            name: self._channel.receive(spec, Channel.ENCODER_INPUTS)
            for name, spec in zip(self._encoder_inputs, message.inputs, strict=True)
            if spec is not None
        }
        lengths = self._read(given)
        encoder, _ = self._programs.get(lengths)
        return self._encode(message.encoded, given, lengths, encoder)

    def encoded_of(self, number: int) -> Encoded | None:
        """Return what the encoder gave under that number. Raises CommunicationError where this rank has it no more."""
        encoded = self._encoded.get(number)
        if encoded is None:
            raise CommunicationError(f"a step reads what encoder run {number} gave, and rank {self.rank} has it not")
        return encoded

    def _encode(
        self, number: int, given: Mapping[str, torch.Tensor], lengths: Lengths, encoder: RankProgram
    ) -> Encoded:
        self._encoded_count = number
        given = {name: value.to(self.device) for name, value in given.items()}
        scratch = self.empty_cache()
        view = encoder_view(scratch, self.program, encoder)
        inputs = {**given, "past_key_values": view}
        self._call(encoder, {name: inputs[name] for name in encoder.input_names})
        layers = dict(zip(encoder.cache_layers, view.layers, strict=True))
        kept = {name: value for name, value in given.items() if name in self.program.input_names}
        rows = next(iter(given.values())).shape[0]
        read = {"E": lengths["E"]} if "E" in lengths else {}
        encoded = self._encoded[number] = Encoded(number, rows, layers, read, kept)
        return encoded


def seq2seq_class(model_class: type[nn.Module]) -> type[DistributedSeq2SeqLM]:
    """Return DistributedSeq2SeqLM, with the generate of a model class that has its own (of long recordings, say)."""
    own = next(cls for cls in model_class.__mro__ if "generate" in cls.__dict__)
    if own is GenerationMixin:
        return DistributedSeq2SeqLM
    if issubclass(own, nn.Module):
        raise AutodistError(f"{own.__name__} has a generate of its own, which is for one process: call forward instead")
    return type(model_class.__name__, (DistributedSeq2SeqLM, own), {})
