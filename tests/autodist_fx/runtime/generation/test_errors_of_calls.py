"""An error that one rank raises in a call, and arguments that differ by rank, are every rank's error; the next call
works."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import autodist_fx as adx
from tests.support.forked import on_processes
from tests.support.models import tiny_model

IDS, OTHER = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[5, 6, 7, 8, 10]])
OUT_OF_RANGE = torch.tensor([[5, 6, 200]])
OUT_OF_TABLE = "OutOfTableError: input_ids holds 200, and model.embed_tokens has 128 rows: 0 to 127 are allowed"
OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
MOST_SECONDS = 5.0
FURTHER = 20  # calls after all errors


class RaisingStreamer:
    def put(self, value: torch.Tensor) -> None:
        raise ValueError("the streamer's own")

    def end(self) -> None:
        pass


def raising(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    raise KeyError("in a processor")


def without_room(model: Any, on_this_rank: bool) -> Any:
    """A call in which the rank's memory does not suffice for its cache."""
    make = model.empty_cache

    def no_room() -> Any:
        raise torch.OutOfMemoryError("no room for the cache")

    try:
        if on_this_rank:
            model.empty_cache = no_room
        return model.generate(IDS, **OPTIONS)
    finally:
        model.empty_cache = make


Call = Callable[[Any, int, int], Any]  # of a model, on a rank, of which that is the last
ERRORS: dict[str, tuple[Call, str]] = {
    "a token id out of range": (lambda m, r, last: m.generate(OUT_OF_RANGE, **OPTIONS), OUT_OF_TABLE),
    "one in a forward": (lambda m, r, last: m(OUT_OF_RANGE), OUT_OF_TABLE),
    "a processor": (lambda m, r, last: m.generate(IDS, logits_processor=[raising], **OPTIONS), "KeyError: 'in a proc"),
    "a criterion": (lambda m, r, last: m.generate(IDS, stopping_criteria=[raising], **OPTIONS), "KeyError: 'in a proc"),
    "the driver's streamer": (
        lambda m, r, last: m.generate(IDS, streamer=RaisingStreamer() if m.is_driver else None, **OPTIONS),
        "ValueError: the streamer's own",
    ),
    "a follower's streamer": (
        lambda m, r, last: m.generate(IDS, streamer=None if m.is_driver else RaisingStreamer(), **OPTIONS),
        "ValueError: the streamer's own",
    ),
    "no memory on the first rank": (lambda m, r, last: without_room(m, r == 0), "OutOfMemoryError: no room for the c"),
    "no memory on the last rank": (lambda m, r, last: without_room(m, r == last), "OutOfMemoryError: no room for the"),
    "an unknown option": (lambda m, r, last: m.generate(IDS, nonsense=3, **OPTIONS), "ValueError: The following"),
    "an argument forward has not": (lambda m, r, last: m(IDS, nonsense=IDS), "AutodistError: LlamaForCausalLM.f"),
    "a config on one rank": (
        lambda m, r, last: m.generate(IDS, m.generation_config if r == last else None, **OPTIONS),
        "DisagreementError: the ranks do not agree: the list of arguments is ",
    ),
    "another prompt": (
        lambda m, r, last: m.generate(IDS if r else OTHER, **OPTIONS),
        "DisagreementError: the ranks do not agree: inputs is int64[1, 5] ",
    ),
    "another length": (
        lambda m, r, last: m(IDS if r else IDS[:, :3]),
        "DisagreementError: the ranks do not agree: input_ids is int64[1, 3] ",
    ),
    "another dtype": (
        lambda m, r, last: m(IDS, attention_mask=torch.ones_like(IDS) if r else torch.ones(1, 5)),
        "DisagreementError: the ranks do not agree: attention_mask is float32[1, 5] ",
    ),
    "another mask": (
        lambda m, r, last: m(IDS, attention_mask=torch.tensor([[r < last, 1, 1, 1, 1]])),
        "DisagreementError: the ranks do not agree: attention_mask is int64[1, 5] ",
    ),
    "a mask on one rank": (
        lambda m, r, last: m(IDS, **({"attention_mask": torch.ones_like(IDS)} if r == last else {})),
        "DisagreementError: the ranks do not agree: the list of arguments is input_ids on ",
    ),
    "more tokens on one rank": (
        lambda m, r, last: m.generate(IDS, max_new_tokens=4 + (r == last)),
        "DisagreementError: the ranks do not agree: max_new_tokens is 4 on ",
    ),
    "generate and forward": (
        lambda m, r, last: m.generate(IDS, **OPTIONS) if r else m(IDS),
        "DisagreementError: the ranks do not agree: the call is forward on rank 0, and generate on ",
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.one_for_each()
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
def test_every_rank_raises_the_same_and_the_next_call_works(tp: int, pp: int, checkpoint: Path) -> None:
    """All in one group of processes, one error after the other, each followed by a call whose tokens are right."""

    def work(rank: int) -> list[tuple[str, float]]:
        model, found = adx.from_pretrained(checkpoint, tp=tp, pp=pp, device="cpu", timeout=100), []
        model(IDS)  # compiles what the errors below need
        for call, _ in ERRORS.values():
            began = time.monotonic()
            try:
                said = str(call(model, rank, tp * pp - 1))
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
            seconds = time.monotonic() - began
            found.append((f"{said}\n{model.generate(IDS, **OPTIONS).tolist()}", seconds))
        synced = model.generate(IDS, synced_gpus=True, **OPTIONS)
        further = [model.generate(IDS, **OPTIONS).tolist() for _ in range(FURTHER)]
        return [*found, (str([synced.tolist(), *further]), 0.0)]

    answers = on_processes(tp * pp, work, seconds=120)
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    tokens = model.generate(IDS, pad_token_id=0, **OPTIONS).tolist()
    for told in answers:
        assert not isinstance(told, str), told
        for (said, seconds), (name, (_, text)) in zip(told, ERRORS.items(), strict=False):
            assert said.startswith(text) and said.endswith(f"\n{tokens}"), (name, said)
            assert seconds < MOST_SECONDS, name
        assert told[-1][0] == str([tokens] * (FURTHER + 1))
    for (name, _), *by_rank in zip(ERRORS.items(), *answers, strict=False):
        assert len({said for said, _ in by_rank}) == 1, (name, by_rank)
