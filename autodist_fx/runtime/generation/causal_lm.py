"""`DistributedCausalLM`: one rank's share of a causal LM, called and generating as the whole model would.

Of all ranks, the first of the last stage has the logits: it drives. transformers' own `generate` runs there, and
nowhere else, so that every option of it means what it always means, and its random numbers are those of one process.
Each forward pass that `generate` asks for is announced to the other ranks, which run their graphs along with it. Only
token ids and positions cross ranks for that, some hundred bytes a step, never logits.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from autodist_fx.calls.lengths import Lengths
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.cache.kv_cache import SplitCache, local_cache
from autodist_fx.runtime.comm.channels import Channel
from autodist_fx.runtime.generation.failing_node import name_failing_node
from autodist_fx.runtime.generation.guarded_programs import GuardedPrograms, only
from autodist_fx.runtime.generation.step_messages import Command, StepChannel
from passes.ops.comm import Communicator, using
from passes.program.rank_program import RankProgram

_MASK_SENT, _MASK_GROWN, _NEW_TOKENS, _CACHE_KEPT = 1, 2, 4, 8  # flags of a step
_LETTERS = "BSPTEK"  # of lengths, in a message
_GENERATE = inspect.signature(GenerationMixin.generate)


class DistributedCausalLM(nn.Module, GenerationMixin):
    """What `adx.from_pretrained` and `adx.compile(...).to_distributed()` return, on every rank.

    `program`'s parameters are loaded, on `device`; `ways` has programs for other lengths, too, where the model's code
    depends on them. `logits_on_every_rank` sends what `model(...)` gives from the last
    stage to all ranks; `generate` never does.
    """

    main_input_name = "input_ids"
    _outputs: tuple[type, type] = (GenerateDecoderOnlyOutput, GenerateBeamDecoderOnlyOutput)
    _names: Mapping[str, str] = {}  # what the graph calls an input of the decoder, where it is not the plain name
    _mask_name = "attention_mask"  # in generate's model_kwargs, of the decoder
    base_model_prefix = ""
    _is_stateful = False
    _supports_cache_class = True
    positions_follow_mask = True  # see runtime/positions.py

    def __init__(
        self,
        program: RankProgram,
        communicator: Communicator,
        config: PretrainedConfig,
        generation_config: GenerationConfig | None = None,
        *,
        device: torch.device | str = "cpu",
        logits_on_every_rank: bool = False,
        ways: GuardedPrograms[Any] | None = None,
    ) -> None:
        super().__init__()
        self._ways = ways or only(program)
        self.program, self.communicator, self.config = program, communicator, config
        self.generation_config = generation_config or GenerationConfig.from_model_config(config)
        self.graph_module = program.graph_module.eval()
        self.device = torch.device(device)
        self.dtype = next((p.dtype for p in self.graph_module.parameters() if p.is_floating_point()), torch.float32)
        self.logits_on_every_rank = logits_on_every_rank
        mesh = program.mesh
        self.driver = mesh.rank(mesh.pp - 1, 0)
        self.is_driver = program.rank == self.driver
        self._others = [rank for rank in range(mesh.size) if rank != self.driver]
        self._channel = StepChannel(communicator, self.driver, self._others) if self._others else None
        self._finish_sends = getattr(communicator, "finish_sends", None) or _nothing
        plain = {of_graph: name for name, of_graph in self._names.items()}
        self._inputs = frozenset(plain.get(name, name) for name in program.input_names)
        self._generating = False
        self._caches: weakref.WeakValueDictionary[int, SplitCache] = weakref.WeakValueDictionary()
        self._cache_count = 0
        # On the driver, between two steps: the mask that is the last one and a column of ones, and how many tokens of
        # each row it shows, [batch, 1]: the position of the next.
        self._grown_mask: torch.Tensor | None = None
        self._next_positions: torch.Tensor | None = None

    @property
    def mesh(self):  # type: ignore[no-untyped-def]
        return self.program.mesh

    @property
    def rank(self) -> int:
        return self.program.rank

    @property
    def _told_positions(self) -> bool:
        return self.positions_follow_mask and "position_ids" in self._inputs

    def can_generate(self) -> bool:
        return True

    def new_cache(self) -> SplitCache:
        """An empty cache for `past_key_values=`; to be made on every rank."""
        return self._make_cache(self._cache_count + 1)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: SplitCache | None = None,
        cache_position: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """One forward pass; called on every rank with the same arguments.

        `input_ids` [batch, tokens], `attention_mask` [batch, cached + tokens] (ones when None), `position_ids` [batch,
        tokens] (counted from the start of the row, padding included, when None). `.logits` [batch, 1, vocabulary] of
        the last position, on the ranks of the last stage (elsewhere None, but for `logits_on_every_rank`).
        """
        if output_attentions or output_hidden_states:
            raise AutodistError(
                "the ranks' graphs give logits and the cache: output_attentions and output_hidden_states need the "
                "model itself"
            )
        if input_ids is None:
            raise AutodistError("a distributed model takes input_ids, and got none")
        if past_key_values is not None and not isinstance(past_key_values, SplitCache):
            raise AutodistError(
                f"past_key_values is a {type(past_key_values).__name__} of one process: use model.new_cache(), or the "
                "past_key_values of an earlier output of this model"
            )
        cache = self._make_cache(self._cache_count + 1) if past_key_values is None else past_key_values
        batch, tokens = input_ids.shape
        if cache_position is None:
            past = cache.get_seq_length()
            cache_position = torch.arange(past, past + tokens, device=input_ids.device)
        if position_ids is None:
            position_ids = cache_position[None]
        if position_ids.shape[0] != batch:
            position_ids = position_ids.expand(batch, tokens)
        if attention_mask is None:
            attention_mask = torch.ones(batch, cache.get_seq_length() + tokens, dtype=torch.long)
        lengths = self._lengths(cache, input_ids)
        self._prepare(self._ways_for(lengths), lengths)
        if self._generating:
            kept = past_key_values is not None or use_cache is not False
            self._announce_step(cache, kept, input_ids, attention_mask, position_ids, cache_position)
        logits = self._run(cache, input_ids, attention_mask, position_ids, cache_position)
        if logits is not None and logits.shape[1] > 1 and self._generating:
            logits = logits[:, -1:, :]
        if self.logits_on_every_rank and not self._generating:
            logits = self._share_logits(logits)
        return CausalLMOutputWithPast(logits=logits, past_key_values=None if use_cache is False else cache)

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`: called on every rank with the same arguments, gives every rank the same tokens.

        A `streamer` may be passed on any of the ranks. Logits processors and stopping criteria are called on the driver
        alone. With `return_dict_in_generate`, scores and logits are the driver's, the sequences everyone's. What the
        driver raises, all ranks raise. Assisted generation is refused: the graphs give the logits of one position.
        """
        if self._generating:  # called by transformers' generate itself: to heal tokens, say
            return super().generate(*args, **kwargs)
        if self._channel is None:
            return self._drive(*args, **kwargs)
        if not self.is_driver:
            given = _GENERATE.bind(self, *args, **kwargs).arguments
            given |= given.pop("kwargs", {})
            return self._follow(self._channel, given.get("streamer"), self._prompt(given))
        try:
            result = self._drive(*args, **kwargs)
        except BaseException as error:
            self._channel.say_error(error)
            raise
        sequences = result if isinstance(result, torch.Tensor) else result["sequences"]
        kind = 0 if isinstance(result, torch.Tensor) else 2 if "Beam" in type(result).__name__ else 1
        kept = getattr(result, "past_key_values", None) if kind else None
        self._channel.say(Command.END, (kind, sequences.shape[0], kept.number if kept is not None else 0), (sequences,))
        self._finish_sends()
        return result

    @staticmethod
    def _prompt(given: Mapping[str, Any]) -> torch.Tensor | None:
        """What a streamer is handed first, of generate's arguments; None: what the first step is given."""
        return given.get("inputs", given.get("input_ids"))

    # ------------------------------------------------------------------------------------------- on the driver

    def _drive(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("inputs_embeds") is not None:
            raise AutodistError("generating over ranks starts from input_ids, which the ranks' graphs embed themselves")
        if kwargs.get("token_type_ids") is not None:
            raise AutodistError(
                "generating over ranks takes no token_type_ids: call the tokenizer with return_token_type_ids=False"
            )
        self._generating = True
        try:
            return super().generate(*args, **kwargs)
        finally:
            self._generating, self._grown_mask, self._next_positions = False, None, None

    def _announce_step(
        self,
        cache: SplitCache,
        kept: bool,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        cache_position: torch.Tensor,
    ) -> None:
        if self._channel is None:
            return
        self._finish_sends()
        flags, payload = _CACHE_KEPT if kept else 0, [input_ids]
        if attention_mask is self._grown_mask:
            flags |= _NEW_TOKENS
        if "position_ids" in self._inputs:
            payload.append(position_ids)
        if "attention_mask" in self._inputs:
            if attention_mask.dim() != 2:
                raise AutodistError(f"attention_mask must be [batch, tokens]; got {list(attention_mask.shape)}")
            if flags & _NEW_TOKENS and cache.mask_tokens == attention_mask.shape[1] - 1:
                flags |= _MASK_GROWN
            else:
                flags |= _MASK_SENT
                payload.append(attention_mask.long())
            cache.mask_tokens = attention_mask.shape[1]
        batch, tokens = input_ids.shape
        numbers = (cache.number, batch, tokens, flags, attention_mask.shape[1])
        self._channel.say(Command.STEP, (*numbers, int(cache_position[0]), *self._further_numbers()), payload)

    def _prepare(self, ways: GuardedPrograms[Any], lengths: Lengths) -> None:
        """See that there is something to run for these lengths, on all ranks, before any runs. Raises AutodistError."""
        if ways.known(lengths) is not None:
            return
        if self._generating and self._channel is not None:
            self._finish_sends()
            self._channel.say(Command.PREPARE, [lengths.get(letter, -1) for letter in _LETTERS])
        ways.get(lengths)

    def _announce_to_caches(self, what: str, cache: SplitCache, numbers: torch.Tensor) -> None:
        if self._generating and self._channel is not None:
            self._channel.say(Command[what.upper()], (cache.number,), (numbers.long(),))

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: SplitCache | None = None,
        attention_mask: torch.Tensor | None = None,
        cache_position: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in GenerationMixin, which spends 0.2 ms a token on cases that do not occur here."""
        assert cache_position is not None
        tokens = cache_position.shape[0]
        if past_key_values is not None and input_ids.shape[1] != tokens:
            input_ids = input_ids[:, -tokens:]
        position_ids = kwargs.pop("position_ids", None)
        if position_ids is None and attention_mask is not None and self._told_positions:
            if attention_mask is self._grown_mask and self._next_positions is not None and past_key_values is not None:
                position_ids, self._next_positions = self._next_positions, self._next_positions + 1
            else:
                seen = attention_mask.long().cumsum(-1)
                position_ids = (seen - 1).masked_fill_(attention_mask == 0, 1)
                self._next_positions = seen[:, -1:]
        if position_ids is not None and past_key_values is not None:
            position_ids = position_ids[:, -input_ids.shape[1] :]
        return {
            "input_ids": input_ids.contiguous(),
            "attention_mask": attention_mask,
            "position_ids": position_ids.contiguous() if position_ids is not None else None,
            "past_key_values": past_key_values,
            "cache_position": cache_position,
            # generate hands on all that it was given; tokenizers are for its stop strings
            **{k: v for k, v in kwargs.items() if v is not None and not k.endswith("tokenizer")},
        }

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: Any, *args: Any, **kwargs: Any) -> Any:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        self._grown_mask = model_kwargs.get(self._mask_name)
        return model_kwargs

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Every rank caches its own layers and heads; what the config says of static caches is about compiling."""
        if generation_config.cache_implementation == "quantized":
            raise AutodistError("a quantized cache is not supported over ranks: leave cache_implementation out")
        generation_config.cache_implementation = None
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self._make_cache(self._cache_count + 1)

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        raise AutodistError(
            "assisted generation (assistant_model, prompt_lookup_num_tokens) needs the logits of several positions, "
            "and the ranks' graphs give those of the last one: generate without it"
        )

    # ------------------------------------------------------------------------------------------- on the others

    def _follow(self, channel: StepChannel, streamer: Any, prompt: torch.Tensor | None) -> Any:
        """Do what the driver says until it says that this is the end; the same result as on the driver."""
        kept: dict[int, SplitCache] = {}  # alive until the end: a logits processor may have one of its own
        streamed_prompt = False
        while True:
            self._finish_sends()
            command, numbers, payload = channel.hear()
            if command is Command.STEP:
                cache = self._make_cache(numbers[0])
                if numbers[3] & _CACHE_KEPT:
                    kept[cache.number] = cache
                input_ids = self._follow_step(cache, numbers, payload)
                if streamer is not None and not streamed_prompt:
                    streamer.put((input_ids if prompt is None else prompt).cpu())
                    streamed_prompt = True
                if streamer is not None and numbers[3] & _NEW_TOKENS:
                    streamer.put(input_ids[:, -1].cpu())
            elif command is Command.REORDER:
                self._make_cache(numbers[0]).reorder_cache(payload.to(self.device))
            elif command is Command.CROP:
                self._make_cache(numbers[0]).crop(int(payload[0]))
            elif command is Command.ENCODE:
                self._follow_encode(numbers, payload)
            elif command is Command.PREPARE:
                lengths = {letter: n for letter, n in zip(_LETTERS, numbers, strict=False) if n >= 0}
                with contextlib.suppress(AutodistError):  # the driver has the same, and says it
                    self._ways_for(lengths).get(lengths)
            elif command is Command.ERROR:
                raise channel.heard_error(numbers, payload)
            else:
                break
        kind, rows, cache_number = numbers[:3]
        sequences = payload.view(rows, -1).to(self.device)
        if streamer is not None:
            streamer.put(sequences[:, -1].cpu())
            streamer.end()
        if kind == 0:
            return sequences
        return self._outputs[kind - 1](sequences=sequences, past_key_values=self._caches.get(cache_number))

    def _follow_step(self, cache: SplitCache, numbers: list[int], payload: torch.Tensor) -> torch.Tensor:
        """Run the graph on what the driver says; the step's input_ids [batch, tokens]."""
        _, batch, tokens, flags, mask_tokens, first_position = numbers[:6]
        device = self.device
        if device.type != "cpu":
            payload = payload.to(device)
        used = batch * tokens
        input_ids = payload[:used].view(batch, tokens)
        position_ids = None
        if "position_ids" in self._inputs:
            position_ids = payload[used : 2 * used].view(batch, tokens)
            used *= 2
        if flags & _MASK_SENT:
            cache.mask = payload[used:].view(batch, mask_tokens)
        elif flags & _MASK_GROWN:
            assert cache.mask is not None
            cache.mask = torch.cat([cache.mask, cache.mask.new_ones(batch, 1)], dim=-1)
        positions = torch.arange(first_position, first_position + tokens, device=device)
        self._run(cache, input_ids, cache.mask, position_ids, positions)
        return input_ids

    # --------------------------------------------------------------------------------------------- on every rank

    def _run(
        self,
        cache: SplitCache,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache_position: torch.Tensor,
    ) -> torch.Tensor | None:
        """This rank's graph; the logits where it has them."""
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": cache,
            "cache_position": cache_position,
        }
        given = {self._names.get(name, name): value for name, value in given.items()} | self._further_inputs(cache)
        program = self._program_for(self._lengths(cache, input_ids))
        outputs = self._call(program, {name: given[name] for name in program.input_names})
        cache.tokens += input_ids.shape[1]
        return outputs.get("logits")

    def _lengths(self, cache: SplitCache, input_ids: torch.Tensor) -> Lengths:
        """Of a call, by letter."""
        batch, tokens = input_ids.shape
        return {"B": batch, "S": tokens, "P": cache.tokens, "T": cache.tokens + tokens}

    def _ways_for(self, lengths: Lengths) -> GuardedPrograms[Any]:
        return self._ways

    def _program_for(self, lengths: Lengths) -> RankProgram:
        program: RankProgram = self._ways.get(lengths)
        return program

    def _call(self, program: RankProgram, inputs: dict[str, Any]) -> dict[str, Any]:
        """One of this rank's programs, on its device; what it gives back, by name."""
        if self.device.type != "cpu":
            inputs = {name: x.to(self.device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
        try:
            with using(self.communicator):
                outputs: dict[str, Any] = program.graph_module(**inputs)
        except Exception as error:
            if not isinstance(error, AutodistError):
                name_failing_node(error, program.graph_module, self.rank)
            raise
        return outputs

    def _further_numbers(self) -> tuple[int, ...]:
        """What the others are told of a step besides: up to 2, at positions 6 and 7."""
        return ()

    def _further_inputs(self, cache: SplitCache) -> dict[str, Any]:
        """What the graph takes besides, by its own names."""
        return {}

    def _follow_encode(self, numbers: list[int], payload: torch.Tensor) -> None:
        raise AutodistError("there is no encoder in this model")

    def _empty_cache(self) -> SplitCache:
        return local_cache(self.config, self.program, SplitCache)

    def _make_cache(self, number: int) -> SplitCache:
        """The cache of that number; an empty one at first."""
        cache = self._caches.get(number)
        if cache is None:
            cache = self._empty_cache()
            cache.number = number
            if self.is_driver:
                cache.announce = self._announce_to_caches
            self._caches[number] = cache
            self._cache_count = max(self._cache_count, number)
        return cache

    def _share_logits(self, logits: torch.Tensor | None) -> torch.Tensor | None:
        """The driver's logits, on every rank."""
        if self._channel is None:
            return logits
        if self.is_driver:
            assert logits is not None
            self._channel.say(Command.END, (0, *logits.shape))
            for rank in self._others:
                self.communicator.send(logits, rank, Channel.LOGITS)
            return logits
        _, numbers, _ = self._channel.hear()
        return self.communicator.recv(tuple(numbers[1:4]), self.dtype, self.device, self.driver, Channel.LOGITS)


def _nothing() -> None:
    pass
