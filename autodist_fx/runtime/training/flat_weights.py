"""`FlatWeights`: parameters in buckets of one piece of memory each, of which each replica steps its part.

As in ZeRO's first stage (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054): every replica has all weights and
gradients, and optimizer states of its own part alone; the parts that others have stepped it gets from them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from autodist_fx.runtime.training.replica_communicator import TrainingCommunicator

Range = tuple[int, int]  # of the elements of a parameter, flat: [start, stop)


class FlatWeights:
    """The parameters of `buckets`, which lie in flat memory from here on; each replica's part of a bucket has one size,
    so that the last ones may reach beyond the last parameter."""

    def __init__(self, buckets: Sequence[Sequence[nn.Parameter]], replicas: int) -> None:
        self._flat: list[torch.Tensor] = []
        self._ranges: dict[int, list[Range]] = {}  # by id of a parameter: what each replica steps of it
        for members in buckets:
            size = -(-sum(p.numel() for p in members) // replicas)
            flat = members[0].new_zeros(size * replicas, requires_grad=False)
            before = 0
            for parameter in members:
                place = flat.narrow(0, before, parameter.numel()).view(parameter.shape)
                place.copy_(parameter.detach())
                parameter.data = place
                bounds = [min(max(n * size - before, 0), parameter.numel()) for n in range(replicas + 1)]
                self._ranges[id(parameter)] = list(itertools.pairwise(bounds))
                before += parameter.numel()
            self._flat.append(flat)

    def range_of(self, parameter: nn.Parameter, replica: int) -> Range:
        """Return the elements of a parameter that a replica steps, of the parameter's own, flat."""
        return self._ranges[id(parameter)][replica]

    def gather(self, communicator: TrainingCommunicator) -> None:
        """Take what each replica has stepped from it. Called on all replicas alike."""
        waits = [communicator.start_all_gather(flat, "dp") for flat in self._flat]
        for wait in waits:
            wait()
