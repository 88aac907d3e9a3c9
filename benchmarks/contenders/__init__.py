"""One file a contender. Each offers `build(path) -> Contender`, called in every rank's process."""

import importlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Contender(Protocol):
    """The methods of a model that the benchmark calls, however it is split."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Full logits, on every rank, without a KV cache."""
        ...

    def forward_sharded(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Only for contenders marked `sharded_logits`: each rank keeps its part of the vocabulary."""
        ...

    def decode(self, input_ids: Tensor, attention_mask: Tensor, new_tokens: int) -> Tensor:
        """Prompt and greedy continuation with a KV cache, on every rank."""
        ...


@dataclass(frozen=True, slots=True)
class Entry:
    """How a contender is started and called in the tables."""

    title: str
    world_size: int = 2
    threads: int = 1
    sharded_logits: bool = False  # also timed without gathering the logits, which `generate` never needs
    against: str = "ours"  # whose time its own is divided by


ENTRIES = {
    "ours": Entry("autodist_fx"),
    "single": Entry("one process, 2 threads", world_size=1, threads=2),
    "transformers_tp": Entry('transformers tp_plan="auto"'),
    "dtensor_tp": Entry("DTensor parallelize_module"),
    "megatron_tp": Entry("hand-written Megatron-style", sharded_logits=True),
    "ours_pp": Entry("autodist_fx, pp=2"),
    "transformers_pp": Entry("transformers pp_size=2", against="ours_pp"),
}


def load(name: str, path: str) -> Contender:
    """Build one contender in this process."""
    return importlib.import_module(f"contenders.{name}").build(path)


class HuggingFaceContender:
    """A transformers model that is called as its users call it; only its weights are split."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    def decode(self, input_ids: Tensor, attention_mask: Tensor, new_tokens: int) -> Tensor:
        return self.model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        )
