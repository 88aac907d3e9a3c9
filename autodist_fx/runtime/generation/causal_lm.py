"""`DistributedCausalLM`: one rank's share of a causal LM, called and generating as the whole model would.

Of all ranks, the first of the last stage has the logits: the driver. transformers' own `generate` runs there, and
nowhere else, so that every option of it means what it always means, and its random numbers are those of one process.
Each forward pass that `generate` asks for is announced to the other ranks (leader.py), which run their programs along
with it (follower.py). Only token ids and positions cross ranks for that, some hundred bytes a step, never logits.

Here is what callers see: `forward` and `generate`, which the user calls on every rank, and what transformers'
`generate` calls on the driver: `forward` again and the methods behind it. What every rank does with a step is in
step_runner.py.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from autodist_fx.calls.cache_names import CACHE_FIELD, cache_argument
from autodist_fx.calls.call import Call, by_name, read_call
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.cache.cross_cache import Encoded
from autodist_fx.runtime.cache.kv_cache import SplitCache
from autodist_fx.runtime.family_inputs import expanded_media, of_family
from autodist_fx.runtime.generation.collective_call import collective
from autodist_fx.runtime.generation.follower import Follower
from autodist_fx.runtime.generation.guarded_programs import GuardedPrograms
from autodist_fx.runtime.generation.leader import Leader
from autodist_fx.runtime.generation.step import Step
from autodist_fx.runtime.generation.step_runner import RunnerParts, StepRunner
from autodist_fx.runtime.generation.versions import GenerationHooks
from autodist_fx.runtime.microbatches.announced import OneByOne
from autodist_fx.runtime.microbatches.bounded_sends import BoundedSends
from autodist_fx.runtime.microbatches.count import Microbatches, checked
from autodist_fx.runtime.microbatches.grouped_generation import GroupedGeneration

_GENERATE = inspect.signature(GenerationMixin.generate)
_SYNCED_GPUS = [*_GENERATE.parameters].index("synced_gpus") - 1  # its position, after self
_AS_GENERATING = (("logits_to_keep", 1),)  # arguments that the programs which fill a cache are made for


class DistributedCausalLM(GroupedGeneration, StepRunner, GenerationHooks):
    """The model that `adx.from_pretrained` and `adx.compile(...).to_distributed()` return, on every rank. `family`: a
    model without weights, where its class prepares its own inputs for generating (family_inputs.py)."""

    main_input_name = "input_ids"
    _outputs: tuple[type, type] = (GenerateDecoderOnlyOutput, GenerateBeamDecoderOnlyOutput)
    _mask_name = "attention_mask"  # in generate's model_kwargs, of the decoder
    _is_stateful = False
    _supports_cache_class = True

    def __init__(self, parts: RunnerParts, programs: GuardedPrograms[Any], family: nn.Module | None = None) -> None:
        super().__init__(parts, programs)
        object.__setattr__(self, "family", family)  # no submodule: its parameters are on meta

    @property
    def _told_positions(self) -> bool:
        return self.positions_follow_mask and "position_ids" in self._inputs

    @property
    def _counted_by_model(self) -> bool:
        """Return whether the model counts the positions that a call by hand leaves out; generate gives them."""
        return self._leader is None and self._call_programs is not None and self._call_programs.positions_of_values

    def can_generate(self) -> bool:
        """Return True, which transformers asks."""
        return True

    def new_cache(self) -> SplitCache:
        """Return an empty cache for `cache=` or `past_key_values=`; to be called on every rank."""
        return self.caches.new()

    @collective
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        *others: Any,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: SplitCache | None = None,
        cache: SplitCache | None = None,
        cache_position: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        microbatches: Microbatches | None = None,
        **keywords: Any,
    ) -> Any:
        """Run one forward pass; called on every rank with the same arguments.

        Takes what the model's own forward takes (`others`: by position) and returns what that returns, on every rank:
        `.logits` [batch, tokens, vocabulary], with `labels` its `.loss`. A call unlike those before is compiled first.

        With `use_cache` or a cache (`cache` and `past_key_values` are the same) the cache is filled, and `.logits` are
        those of the last position, [batch, 1, vocabulary], on the ranks of the last stage (elsewhere None, but for
        `logits_on_every_rank`). Then there are `input_ids` [batch, tokens], `attention_mask` [batch, cached + tokens]
        (ones when None), `position_ids` [batch, tokens] (when None counted as the model itself does: in most from the
        start of the row, padding included) and no others.

        Raises AutodistError, which names the argument, where there is no such program.
        """
        past_key_values = either_cache(past_key_values, cache)
        if self._leader is None and self._call_programs is not None:
            named = {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "position_ids": position_ids,
                "past_key_values": past_key_values,
                "cache_position": cache_position,
                "use_cache": use_cache,
                "output_attentions": output_attentions,
                "output_hidden_states": output_hidden_states,
                "return_dict": return_dict,
            }
            call = read_call(self._call_programs.signature, self._given(others, {**named, **keywords}), {})
            if not call.use_cache:
                return self._run_call(self._call_programs, call, microbatches)
            self._refuse_with_cache(call, ("input_ids", "attention_mask", "position_ids", "cache_position"))
            get = call.tensors.get
            input_ids, attention_mask, position_ids = get("input_ids"), get("attention_mask"), get("position_ids")
            past_key_values, cache_position = call.cache, get("cache_position")
            keywords = {}
        further = {name: value for name, value in keywords.items() if isinstance(value, torch.Tensor)}
        refuse_keywords({name: value for name, value in keywords.items() if name not in further})
        refuse_inner_outputs(output_attentions, output_hidden_states)
        if input_ids is None:
            raise AutodistError("a distributed model takes input_ids, and got none")
        found = self._forward(
            input_ids, attention_mask, position_ids, past_key_values, cache_position, use_cache,
            further=further, microbatches=microbatches,
        )  # fmt: skip
        return found.to_tuple() if return_dict is False else found

    def _given(self, others: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call that are not None, by name; `others` follow the first in the model's own
        order."""
        assert self._call_programs is not None
        given = {name: value for name, value in keywords.items() if value is not None}
        return by_name(self._call_programs.signature.argument_names, [None, *others], given)

    def _refuse_with_cache(self, call: Call, takes: Sequence[str]) -> None:
        """Raise AutodistError for what the programs that fill a cache are not made for."""
        refused = [name for name in call.tensors if name not in takes]
        refused += [name for name, value in call.fixed.items() if (name, value) not in _AS_GENERATING]
        if refused:
            raise AutodistError(
                f"with a KV cache a distributed model takes no {', '.join(refused)}: call it with use_cache=False and "
                "without past_key_values"
            )
        for name, value in call.tensors.items():
            spec = self._programs.specs.get(name)
            if spec is not None and value.dim() > len(spec.dims):
                raise AutodistError(
                    f"{name} is {list(value.shape)}, and with a KV cache a distributed model takes it with "
                    f"{len(spec.dims)} dims: call it with use_cache=False and without past_key_values"
                )

    def _forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past_key_values: SplitCache | None,
        cache_position: torch.Tensor | None,
        use_cache: bool | None,
        encoded: Encoded | None = None,
        further: Mapping[str, torch.Tensor] | None = None,
        microbatches: Microbatches | None = None,
    ) -> CausalLMOutputWithPast:
        """Run a step, which reads `encoded` in a model with an encoder. `further`: inputs that no usual step has, by
        forward's names."""
        if past_key_values is not None and not isinstance(past_key_values, SplitCache):
            raise AutodistError(
                f"the cache is a {type(past_key_values).__name__} of one process: use model.new_cache(), or the cache "
                "of an earlier output of this model"
            )
        cache = self.caches.new() if past_key_values is None else past_key_values
        batch, tokens = input_ids.shape
        if cache_position is None:
            past = cache.get_seq_length()
            cache_position = torch.arange(past, past + tokens, device=input_ids.device)
        further = dict(further or {})
        if position_ids is not None and position_ids.dim() > 2:  # of several kinds: along height, width and time
            further["position_ids"], position_ids = position_ids, None
        if position_ids is None and not self._counted_by_model:
            position_ids = cache_position[None]
        if position_ids is not None and position_ids.shape[0] == 1:
            position_ids = position_ids.expand(batch, tokens)
        shows_all = attention_mask is None
        if attention_mask is None:
            attention_mask = torch.ones(batch, cache.get_seq_length() + tokens, dtype=torch.long)
        rows = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        rows = {name: value for name, value in rows.items() if value is not None}
        if any(value.shape[0] != batch for value in rows.values()):  # input_ids: a row a codebook (Dia's)
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in rows.items())
            raise AutodistError(f"a step over ranks has as many rows of each input, and got {shapes}: use one process")
        step = Step(cache, input_ids, attention_mask, position_ids, cache_position, encoded, shows_all, further)
        is_usual, cache_kept = self.is_usual(step), past_key_values is not None or use_cache is not False
        if is_usual and (parts := self._chunked(step, microbatches)) is not None:
            logits = self._run_chunks(parts, cache_kept=cache_kept)
        else:
            variant = self._choose(step) if is_usual else None
            if self._leader is not None:
                self._leader.announce_steps((step,), cache_kept=cache_kept)
            logits = self.run_variant(step, variant) if is_usual else self._run_unusual(step)
        if self._leader is not None:
            logits = None if logits is None else logits[:, -1:, :]
        elif self.logits_on_every_rank:
            logits = self._share({} if logits is None else {"logits": logits})["logits"]
        return CausalLMOutputWithPast(logits=logits, **{CACHE_FIELD: None if use_cache is False else cache})

    @functools.partial(collective, takes=GenerationMixin.generate)
    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does: called on every rank with the same arguments, gives every rank the same
        tokens.

        A `streamer` may be passed on any of the ranks. Logits processors and stopping criteria are called on the driver
        alone. With `return_dict_in_generate`, scores and logits are the driver's, the sequences everyone's. What any
        rank raises, all ranks raise, and the next call works. Arguments that differ are named on all ranks. Assisted
        generation is refused: the graphs give the logits of one position.

        `microbatches` (None: the attribute): on pp > 1 a batch is generated in so many groups of rows, which go round
        the stages in turns; tokens are the same for greedy search and beams. With do_sample each group has a random
        state of its own, drawn from the caller's, so that tokens are others than in one: "auto" leaves such a batch
        whole. `in_flight` says how the last call was divided, and why.
        """
        if self._leader is not None:  # called by transformers' generate itself: to heal tokens, say
            return super().generate(*args, **kwargs)
        wanted = self._asked = checked(kwargs.pop("microbatches", None), self.microbatches)
        given = _GENERATE.bind(self, *args, **kwargs).arguments
        given = {**given.pop("kwargs", {}), **given}
        given.pop("self")
        if not self.is_driver and self._channel is not None:
            follower = Follower(
                self, self._channel, self._outputs, streamer=given.get("streamer"), prompt=self._prompt(given)
            )
            result = follower.follow(BoundedSends(self.communicator))
            self._finish_sends()
            return result
        drive = functools.partial(self._drive, super().generate)
        self._leader = Leader(self._channel, OneByOne(self._finish_sends), self._inputs)
        try:
            if (groups := self._groups(given, wanted)) is not None:
                return self._lead_groups(drive, groups, given)
            return self._leader.lead(functools.partial(drive, *args, **kwargs))
        finally:
            self._leader = self._asked = None

    @collective
    @torch.no_grad()
    def generate_many(
        self,
        inputs: Sequence[Mapping[str, Any] | torch.Tensor],
        *,
        microbatches: Microbatches | None = None,
        **options: Any,
    ) -> list[torch.Tensor]:
        """Generate for many batches, so that a pipeline is kept full: as soon as one ends, the next takes its place.

        Each of `inputs` is a batch as generate takes it: a dict of tensors (input_ids [rows, tokens], attention_mask,
        ...), or token ids [rows, tokens] or [tokens]. `microbatches` batches are in flight at a time ("auto": one more
        than there are stages). `options` are generate's. Returns the sequences of each batch, int64 [rows, tokens], on
        every rank, as generate gives them for it alone; with do_sample each batch has a random state of its own, drawn
        from the caller's. Raises AutodistError for options that are not of one batch (a streamer, processors, a cache,
        return_dict_in_generate).
        """
        wanted = checked(microbatches, self.microbatches)
        batches = [dict(each) if isinstance(each, Mapping) else {"inputs": torch.atleast_2d(each)} for each in inputs]
        if not batches:
            return []
        if not self.is_driver and self._channel is not None:
            follower, sends = Follower(self, self._channel, self._outputs), BoundedSends(self.communicator)
            found = [follower.follow(sends) for _ in batches]
            self._finish_sends()
            return found
        drive = functools.partial(self._drive, super().generate)
        return self._lead_many(drive, [{**options, **batch} for batch in batches], wanted)

    def _drive(self, generate: Any, *args: Any, **kwargs: Any) -> Any:
        """Run transformers' `generate` on the driver, with what ranks can be given."""
        if kwargs.get("inputs_embeds") is not None:
            raise AutodistError("generating over ranks starts from input_ids, which the ranks' graphs embed themselves")
        if kwargs.get("token_type_ids") is not None and self.family is None:
            raise AutodistError(
                "generating over ranks takes no token_type_ids: call the tokenizer with return_token_type_ids=False"
            )
        if len(args) > _SYNCED_GPUS:  # of which transformers would ask all processes, and this is one: ours are in step
            args = (*args[:_SYNCED_GPUS], False, *args[_SYNCED_GPUS + 1 :])
        elif kwargs.get("synced_gpus"):
            kwargs["synced_gpus"] = False
        if name := cache_argument(kwargs):
            kwargs[CACHE_FIELD] = kwargs.pop(name)
        return generate(*args, **kwargs)

    @staticmethod
    def _prompt(given: Mapping[str, Any]) -> torch.Tensor | None:
        """Return what a streamer is handed first, of generate's arguments; None: what the first step is given."""
        return given.get("inputs", given.get("input_ids"))

    # --------------------------------------------------------------- called by transformers' generate, on the driver

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Refuse what the model's own forward does not take, as transformers does."""
        known = () if self._call_programs is None else self._call_programs.signature.argument_names
        super()._validate_model_kwargs({name: value for name, value in model_kwargs.items() if name not in known})

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Repeat a batch's inputs for beams and the like; the family says how, where images are not one a row."""
        if (own := of_family(self.family, "_expand_inputs_for_generation")) is not None:
            return own(expand_size, is_encoder_decoder, input_ids, **kwargs)
        media = {}
        if self.family is not None and input_ids is not None:
            media = expanded_media(self.family, expand_size, input_ids, kwargs)
        others = {name: value for name, value in kwargs.items() if name not in media}
        ids, found = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **others)
        return ids, {**found, **media}

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: Any, *args: Any, **kwargs: Any) -> Any:
        own = of_family(self.family, "_update_model_kwargs_for_generation")
        update = super()._update_model_kwargs_for_generation if own is None else own
        model_kwargs = update(outputs, model_kwargs, *args, **kwargs)
        if self._leader is not None:
            self._leader.choose_tokens(model_kwargs.get(self._mask_name))
        return model_kwargs

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Make a cache of this rank's own layers and heads; what the config says of static caches is about
        compiling."""
        if generation_config.cache_implementation == "quantized":
            raise AutodistError("a quantized cache is not supported over ranks: leave cache_implementation out")
        generation_config.cache_implementation = None
        if model_kwargs.get(CACHE_FIELD) is None and generation_config.use_cache is not False:
            model_kwargs[CACHE_FIELD] = self.caches.new()

    def _supports_logits_to_keep(self) -> bool:
        """Return whether the family's own prepare_inputs_for_generation is told to keep the last position's logits."""
        return self.family is not None and "logits_to_keep" in inspect.signature(self.family.forward).parameters

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        raise AutodistError(
            "assisted generation (assistant_model, prompt_lookup_num_tokens) needs the logits of several positions, "
            "and the ranks' graphs give those of the last one: generate without it"
        )

    # ------------------------------------------------------------ transformers' other ways to generate, which differ

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Raise AutodistError: continuous batching (`generate_batch`, "paged" caches too) is for one process."""
        raise AutodistError(
            "continuous batching keeps keys and values in pages of one process: call generate on every rank instead"
        )

    generate_batch = continuous_batching_context_manager = init_continuous_batching


def either_cache(past_key_values: Any, cache: Any) -> Any:
    """Return the one of the two that is given. Raises AutodistError where both are."""
    if past_key_values is not None and cache is not None:
        raise AutodistError("the call has both past_key_values and cache: pass one of them")
    return cache if past_key_values is None else past_key_values


def refuse_keywords(keywords: Mapping[str, Any]) -> None:
    """Raise AutodistError on an argument, beside those that steps have, that generating programs are not made for."""
    if refused := [n for n, v in keywords.items() if v is not None and (n, v) not in _AS_GENERATING]:
        raise AutodistError(f"the ranks' graphs for generating take no {', '.join(refused)}: generate without")


def refuse_inner_outputs(output_attentions: bool | None, output_hidden_states: bool | None) -> None:
    """Raise AutodistError on a wish for attentions or hidden states, which no rank's generating graph gives."""
    if output_attentions or output_hidden_states:
        raise AutodistError(
            "the ranks' graphs give logits and the cache: output_attentions and output_hidden_states need the model "
            "itself"
        )
