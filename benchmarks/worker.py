"""One rank of one contender: builds its model, then computes on command (see `processes.Ranks`)."""

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import contenders
import torch
import torch.distributed as dist
from processes import answer, serve
from torch import Tensor

BATCH, LENGTH = 4, 128  # of the forward pass; decoding takes one prompt of the same length


class Worker:
    """The commands that the controller can give."""

    def __init__(self) -> None:
        self.contender: contenders.Contender | None = None
        generator = torch.Generator().manual_seed(1)
        self.input_ids = torch.randint(0, 32000, (BATCH, LENGTH), generator=generator)
        self.attention_mask = torch.ones_like(self.input_ids)

    def build(self, name: str, path: str) -> dict[str, Any]:
        self.contender = contenders.load(name, path)
        return {}

    def forward(self, repeat: int, sharded: bool = False) -> dict[str, Any]:
        forward = self.contender.forward_sharded if sharded else self.contender.forward
        seconds = (self._timed(lambda: forward(self.input_ids, self.attention_mask))[0] for _ in range(repeat))
        return {"seconds": statistics.median(seconds)}

    def decode(self, new_tokens: int) -> dict[str, Any]:
        seconds, tokens = self._timed(lambda: self._decode(new_tokens))
        return {"seconds": seconds, "tokens": tokens[0, LENGTH:].tolist()}

    def save_logits(self, path: str) -> dict[str, Any]:
        """For the comparison with the reference; every rank must hold them, the first writes them."""
        logits = self._forward()
        if not dist.is_initialized() or dist.get_rank() == 0:
            torch.save(logits, path)
        return {}

    def collectives(self) -> dict[str, Any]:
        """Per forward pass, and per decode step as the difference between decoding 5 tokens and 1."""
        one, five = self._count(lambda: self._decode(1)), self._count(lambda: self._decode(5))
        step = {name: (five[name] - one[name]) / 4 for name in five}
        return {"forward": self._count(self._forward), "step": {name: n for name, n in step.items() if n}}

    def _forward(self) -> Tensor:
        return self.contender.forward(self.input_ids, self.attention_mask)

    def _decode(self, new_tokens: int) -> Tensor:
        return self.contender.decode(self.input_ids[:1], self.attention_mask[:1], new_tokens)

    @staticmethod
    @torch.no_grad()
    def _timed(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
        if dist.is_initialized():
            dist.barrier()  # no rank waits for the other's start inside the measured time
        start = time.perf_counter()
        result = work()
        return time.perf_counter() - start, result

    @torch.no_grad()
    def _count(self, work: Callable[[], Tensor]) -> Counter[str]:
        """By the profiler: raw and functional (DTensor) collectives both end in an op of the c10d namespace. A
        contender that does not go through it counts its own."""
        if hasattr(self.contender, "count_collectives"):
            return self.contender.count_collectives(work)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            work()
        names = (event.name for event in profile.events())
        return Counter(name.removeprefix("c10d::").rstrip("_") for name in names if name.startswith("c10d::"))


def main() -> None:
    """`worker.py NAME PATH`"""
    worker = Worker()
    with torch.no_grad():
        answer(worker.build, name=sys.argv[1], path=sys.argv[2])
        serve({name: getattr(worker, name) for name in ("forward", "decode", "save_logits", "collectives")})


if __name__ == "__main__":
    main()
