"""A rank's side of the predictions: loads a checkpoint, computes on command, says how long and in how much memory."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import memory
import torch
import torch.distributed as dist

import autodist_fx as adx
from predicting import points

_REPEATS, _TRAINING_REPEATS = 5, 3


def generate(path: str, tp: int, pp: int, hardware: str, pin: dict[str, str]) -> dict[str, Any]:
    """Seconds of forward, prefill and decode step, medians; bytes of the peak above what was held before."""
    before = _settled_rss()
    model = adx.from_pretrained(path, tp=tp, pp=pp, hardware=hardware, pin=pin)
    model.logits_on_every_rank = True
    ids = _ids(points.BATCH, points.TOKENS)
    prompt = _ids(1, points.PROMPT)
    mask = torch.ones_like(ids)

    def decode(new_tokens: int) -> None:
        model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens,
            min_new_tokens=new_tokens, do_sample=False,
        )  # fmt: skip

    with torch.no_grad():
        forward = _median(lambda: model(input_ids=ids, attention_mask=mask), _REPEATS)
        peak = memory.peak_rss_bytes() - before
        prefills, wholes = [], []
        decode(points.NEW_TOKENS)
        for _ in range(_REPEATS):
            prefills.append(_seconds(lambda: decode(1)))
            wholes.append(_seconds(lambda: decode(points.NEW_TOKENS)))
    steps = [(whole - first) / (points.NEW_TOKENS - 1) for first, whole in zip(prefills, wholes, strict=True)]
    return {
        "forward": forward,
        "prefill": statistics.median(prefills),
        "decode step": statistics.median(steps),
        "bytes": peak,
    }


def train(path: str, tp: int, pp: int, hardware: str, pin: dict[str, str]) -> dict[str, Any]:
    """Seconds of a training step, predicted by the engine before it is measured."""
    before = _settled_rss()
    engine = adx.train(path, tp=tp, pp=pp, hardware=hardware, pin=pin)
    ids = _ids(points.TRAIN_BATCH, points.TRAIN_TOKENS)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    engine.step(batch)
    estimate = engine.estimate(batch)
    seconds = _median(lambda: engine.step(batch), _TRAINING_REPEATS, warm=False)
    return {
        "predicted": estimate.seconds,
        "predicted_bytes": estimate.memory_bytes,
        "training step": seconds,
        "bytes": memory.peak_rss_bytes() - before,
    }


def _ids(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, 8000, (batch, tokens), generator=torch.Generator().manual_seed(1))


def _settled_rss() -> int:
    """Give back what was freed, and return what is held now, from which the peak counts."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return memory.reset_peak_rss()


def _median(work: Callable[[], object], repeats: int, *, warm: bool = True) -> float:
    if warm:
        work()
    return statistics.median(_seconds(work) for _ in range(repeats))


def _seconds(work: Callable[[], object]) -> float:
    if dist.is_initialized():
        dist.barrier()  # no rank waits for the other's start inside the measured time
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
