"""`LearningRates`: the optimizer that a Trainer's loop, schedulers and callbacks see, for those of the ranks."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


class LearningRates:
    """Makes the ranks' optimizers, and keeps their learning rates those of `seen`, which has the same groups: with
    weight decay, and without. Its parameters are stand-ins, and it steps nothing.

    `decayed`: names of the parameters with weight decay. `options`: of the optimizer class `kind`.
    """

    def __init__(self, kind: type[Optimizer], options: dict[str, Any], weight_decay: float, decayed: Collection[str]):
        self._kind, self._options, self._decayed = kind, dict(options), frozenset(decayed)
        self._weight_decays = (weight_decay, 0.0)
        self._made: list[Optimizer] = []
        stand_ins = [{"params": [nn.Parameter(torch.zeros(()))]} for _ in self._weight_decays]
        self.seen: Optimizer = torch.optim.SGD(stand_ins, lr=options.get("lr", 0.0))

    def __call__(self, parameters: list[tuple[str, nn.Parameter]]) -> Optimizer:
        """Return the optimizer of one rank (OptimizerFactory)."""
        groups = [
            {"params": [p for n, p in parameters if (n in self._decayed) == is_decayed], "weight_decay": weight_decay}
            for is_decayed, weight_decay in zip((True, False), self._weight_decays, strict=True)
        ]
        self._made.append(self._kind(groups, **self._options))
        self.follow()
        return self._made[-1]

    def follow(self) -> None:
        """Give all optimizers the learning rates that are seen."""
        for made in self._made:
            for group, seen in zip(made.param_groups, self.seen.param_groups, strict=True):
                group["lr"] = seen["lr"]
