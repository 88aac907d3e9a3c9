"""autodist_fx through its public API."""

from collections import Counter
from collections.abc import Callable

from torch import Tensor


class OursContender:
    """The compiled model; `generate` is called as transformers' own is."""

    def __init__(self, model: object) -> None:
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    def decode(self, input_ids: Tensor, attention_mask: Tensor, new_tokens: int) -> Tensor:
        return self.model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        )

    def count_collectives(self, work: Callable[[], object]) -> Counter[str]:
        """Counts what the rank's graph and its runtime ask of the communicator: small ones go over Gloo's send and
        recv, where the profiler sees no collective."""
        counts: Counter[str] = Counter()
        communicator = self.model.communicator
        for name in ("all_reduce", "all_gather", "send", "recv"):
            setattr(communicator, name, self._counting(getattr(communicator, name), name, counts))
        try:
            work()
        finally:
            for name in ("all_reduce", "all_gather", "send", "recv"):
                delattr(communicator, name)  # the class's own again
        return counts

    @staticmethod
    def _counting(method: Callable[..., object], name: str, counts: Counter[str]) -> Callable[..., object]:
        def counted(*args: object, **kwargs: object) -> object:
            counts[name] += 1
            return method(*args, **kwargs)

        return counted


def build(path: str, tp: int = 2, pp: int = 1) -> OursContender:
    """Each rank reads its own slices and compiles its own program."""
    import autodist_fx as adx

    return OursContender(adx.from_pretrained(path, tp=tp, pp=pp))
