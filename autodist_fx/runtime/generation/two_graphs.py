"""A `DistributedCausalLM` with a second graph: one for generating, one for the logits of whole sequences.

Generation needs the logits of the last position alone, so its graph makes no others (the head of a long prompt would
cost more than a layer). `model(input_ids=..., attention_mask=...)` means every position, and no cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from autodist_fx.calls.lengths import lengths_of
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.generation.causal_lm import DistributedCausalLM
from autodist_fx.runtime.generation.collective_call import collective
from autodist_fx.runtime.generation.guarded_programs import GuardedPrograms
from passes.program.rank_program import RankProgram


class TwoGraphCausalLM(DistributedCausalLM):
    """`make_program(input_names)` compiles and loads the second graph for these inputs, at their first use: in what
    comes of it for other lengths, too, where the model's code depends on them. `family`: a model without weights, where
    its class prepares its own inputs for generating (family_inputs.py)."""

    def __init__(
        self,
        program: RankProgram,
        *args: Any,
        make_program: Callable[[tuple[str, ...]], GuardedPrograms[RankProgram]],
        family: Any = None,
        **keywords: Any,
    ) -> None:
        super().__init__(program, *args, **keywords)
        object.__setattr__(self, "family", family)  # no submodule: its parameters are on meta
        self._make_program = make_program
        # Not a submodule: its weights are this model's own, and parameters() should name them once.
        self._whole: dict[tuple[str, ...], GuardedPrograms[RankProgram]] = {}

    @collective
    def forward(  # type: ignore[override]  # what only the cached graph takes is passed on
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        inputs_embeds: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **keywords: Any,
    ) -> CausalLMOutputWithPast:
        """One forward pass; called on every rank with the same arguments.

        Without `past_key_values` and `use_cache`: `.logits` [batch, tokens, vocabulary], on every rank, and with
        `labels` [batch, tokens] the `.loss` that transformers' causal language models give. With either, see
        DistributedCausalLM.forward: the cache is filled, and `.logits` are those of the last position.
        """
        with_cache = past_key_values is not None or bool(use_cache) or keywords.get("cache_position") is not None
        asks_more = any(keywords.get(name) for name in ("output_attentions", "output_hidden_states"))
        if self._leader is not None or with_cache or asks_more or (input_ids is None and inputs_embeds is None):
            more = {"inputs_embeds": inputs_embeds, "token_type_ids": token_type_ids, "labels": labels}
            if refused := [name for name, value in more.items() if value is not None]:
                raise AutodistError(
                    f"with a KV cache a distributed model takes no {', '.join(refused)}: call it with use_cache=False "
                    "and without past_key_values"
                )
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **keywords,
            )
        known = ("cache_position", "output_attentions", "output_hidden_states", "return_dict")
        if unknown := sorted(name for name, value in keywords.items() if value is not None and name not in known):
            raise AutodistError(f"a distributed model's forward takes no {', '.join(unknown)}")
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        assert tokens is not None
        if attention_mask is None:
            attention_mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        given = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
        }
        for name, value in {**given, "labels": labels}.items():
            wanted = list(tokens.shape) if name == "inputs_embeds" else list(tokens.shape[:2])
            if value is not None and list(value.shape) != wanted:
                raise AutodistError(f"{name} is {list(value.shape)}, and should be {wanted}")
        if input_ids is not None and inputs_embeds is not None:
            raise AutodistError("got both input_ids and inputs_embeds: pass one of them")
        logits = self._logits({k: v for k, v in given.items() if v is not None})
        if isinstance(logits_to_keep, torch.Tensor):
            logits = logits[:, logits_to_keep.to(logits.device)]
        elif logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        loss = None
        if labels is not None:
            loss = ForCausalLMLoss(logits=logits, labels=labels.to(logits.device), vocab_size=logits.shape[-1])
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def _logits(self, given: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits of every position, on every rank."""
        names = tuple(given)
        if names not in self._whole:
            self._whole[names] = self._make_program(names)
        programs = self._whole[names]
        program = programs.get(lengths_of(programs.forms, given, 0))
        outputs = self._call(program, {name: given[name].to(self.device) for name in program.input_names})
        return self._share_logits(outputs.get("logits"))
