"""`GradientBuckets`: adds up a stage's gradients over microbatches, in buckets that are summed over dp while backward
goes on.

As in torch's DistributedDataParallel, parameters lie in buckets in reverse order, which is about the order in which a
backward pass comes to them, and a bucket is on its way as soon as the last microbatch has given all of its gradients
and the buckets before it are on theirs: so every replica sums them in one order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from autodist_fx.runtime.training.replica_communicator import TrainingCommunicator

BUCKET_BYTES = 25 * 1024 * 1024  # what DistributedDataParallel has found good


class GradientBuckets:
    """The gradients of `parameters`, each added up in a bucket's memory, in the dtype that `dtype_of` says; None: its
    own. `members`: the parameters of each bucket.

    Each replica gets the whole sums, but of the parameters whose ids are `scattered`: these lie in buckets of their
    own, of `replicas` parts of one size, and a replica gets the sums of its part (flat_weights.py).

    A parameter that nothing of the loss depends on, in any microbatch on any replica, has no gradient, and an optimizer
    leaves it alone, as one process would.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        dtype_of: Callable[[torch.Tensor], torch.dtype] | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        *,
        scattered: Collection[int] = (),
        replicas: int = 1,
    ) -> None:
        self.parameters, self._scattered = tuple(parameters), frozenset(scattered)
        self._numbers = {id(p): number for number, p in enumerate(self.parameters)}
        self._flat: list[torch.Tensor] = []
        self._views: dict[int, torch.Tensor] = {}  # by id of a parameter
        self._bucket: dict[int, int] = {}
        self.members = buckets(self.parameters, bucket_bytes, self._scattered)
        for members in self.members:
            dtype = members[0].dtype if dtype_of is None else dtype_of(members[0])
            size = -(-sum(p.numel() for p in members) // replicas) * replicas
            flat = members[0].new_zeros(size, dtype=dtype, requires_grad=False)
            before = 0
            for parameter in members:
                view = flat.narrow(0, before, parameter.numel()).view(parameter.shape)
                self._views[id(parameter)], self._bucket[id(parameter)] = view, len(self._flat)
                before += parameter.numel()
            self._flat.append(flat)
        self.begin()

    def begin(self) -> None:
        """Forget the gradients of the step before."""
        self._seen: set[int] = set()
        self._waiting = [{id(p) for p in members} for members in self.members]
        self._sums: list[Callable[[], torch.Tensor]] = []
        self._taken: set[int] = set()  # of the microbatch at hand
        self._communicator: TrainingCommunicator | None = None

    def add(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        """Add a microbatch's gradient of a parameter, which may be sparse."""
        view, is_first = self._views[id(parameter)], id(parameter) not in self._seen
        self._seen.add(id(parameter))
        if gradient.is_sparse:
            if is_first:
                view.zero_()
            view.add_(gradient.to(view.dtype))
        elif is_first:
            view.copy_(gradient)
        else:
            view.add_(gradient)

    @contextmanager
    def taking(self, communicator: TrainingCommunicator | None = None) -> Iterator[None]:
        """Take, within, each gradient of a microbatch as backward comes to it, so that no second set of them is held.

        `communicator`: of the last microbatch, whose buckets start to be summed over dp when they are full; those that
        nothing came for go at the end.
        """
        self._communicator, self._taken = communicator, set()
        hooks = [p.register_hook(functools.partial(self._arrived, p)) for p in self.parameters]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if communicator is not None:
            for parameter in self.parameters:
                self._done(parameter)

    def took(self, parameter: nn.Parameter) -> bool:
        """Return whether the microbatch's gradient of a parameter was taken as it came."""
        return id(parameter) in self._taken

    def whole(self, communicator: TrainingCommunicator) -> dict[int, torch.Tensor]:
        """Return the sums over microbatches and replicas, by id of a parameter; those without a gradient are left
        out. Called on all replicas alike, after the last microbatch."""
        for flat, total in zip(self._flat, self._sums, strict=True):
            found = total()
            if found is not flat:
                flat.copy_(found)
        if not self.parameters:
            return {}
        there = torch.tensor([float(id(p) in self._seen) for p in self.parameters], device=self.parameters[0].device)
        there = communicator.start_all_reduce(there, "dp")()
        return {id(p): self._views[id(p)] for p, seen in zip(self.parameters, there.tolist(), strict=True) if seen}

    def _arrived(self, parameter: nn.Parameter, gradient: torch.Tensor) -> torch.Tensor | None:
        """Add a gradient; what autograd keeps in its place is one element."""
        self.add(parameter, gradient)
        self._taken.add(id(parameter))
        if self._communicator is not None:
            self._done(parameter)
        return None if gradient.is_sparse else gradient.new_zeros(()).expand(gradient.shape)

    def _done(self, parameter: nn.Parameter) -> None:
        self._waiting[self._bucket[id(parameter)]].discard(id(parameter))
        while len(self._sums) < len(self._flat) and not self._waiting[len(self._sums)]:
            number = len(self._sums)
            for member in self.members[number]:
                if id(member) not in self._seen:
                    self._views[id(member)].zero_()
            assert self._communicator is not None
            is_scattered = id(self.members[number][0]) in self._scattered
            start = self._communicator.start_reduce_scatter if is_scattered else self._communicator.start_all_reduce
            self._sums.append(start(self._flat[number], "dp"))


def buckets(
    parameters: Sequence[nn.Parameter], most_bytes: int = BUCKET_BYTES, apart: Collection[int] = ()
) -> list[list[nn.Parameter]]:
    """Return the parameters in buckets of one dtype and device each, the last ones first; those whose ids are `apart`
    in others than the rest."""
    found: list[list[nn.Parameter]] = []
    open_buckets: dict[tuple[torch.dtype, torch.device, bool], list[nn.Parameter]] = {}
    for parameter in reversed(parameters):
        kind = parameter.dtype, parameter.device, id(parameter) in apart
        bucket = open_buckets.get(kind)
        if bucket is None or sum(p.nbytes for p in bucket) + parameter.nbytes > most_bytes:
            bucket = open_buckets[kind] = []
            found.append(bucket)
        bucket.append(parameter)
    return found
