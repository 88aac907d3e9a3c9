"""Buckets of gradients are summed while backward goes on, whole or in parts; weights come from who steps them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from autodist_fx.runtime.training.flat_weights import FlatWeights
from autodist_fx.runtime.training.gradient_buckets import GradientBuckets, buckets
from autodist_fx.simulation.thread_communicator import ThreadCommunicator, ThreadWorld
from cost_model.mesh import Mesh

FEATURES = 4


class Notes:
    """A communicator of one replica that notes when a sum begins and when it is waited for."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def start_all_reduce(self, x: torch.Tensor, axis: str) -> Callable[[], torch.Tensor]:
        number = sum(event.startswith("sum") for event in self.events)
        self.events.append(f"sum {number} begins")

        def total() -> torch.Tensor:
            self.events.append(f"wait for {number}")
            return x

        return total


def weights(*sizes: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, FEATURES, generator=generator)) for size in sizes]


def test_a_bucket_is_on_its_way_before_backward_comes_to_the_next() -> None:
    first, unused, second, third = parameters = weights(FEATURES, 1, FEATURES, FEATURES)
    made = GradientBuckets(parameters, bucket_bytes=FEATURES * FEATURES * 4)
    notes, x, read = Notes(), torch.ones(2, FEATURES), [first, second, third]
    for number in range(2):  # microbatches
        y = x
        for name, parameter in (("first", first), ("second", second), ("third", third)):
            y = torch.tanh(y @ parameter)
            if number == 1:
                y.register_hook(lambda g, name=name: notes.events.append(f"backward of {name}"))
        if number == 0:
            once = torch.autograd.grad(y.sum(), read)
            for parameter, gradient in zip(read, once, strict=True):
                made.add(parameter, gradient)
        else:
            with made.taking(notes):
                held = torch.autograd.grad(y.sum(), read)
    assert notes.events == [
        "backward of third", "sum 0 begins", "backward of second", "sum 1 begins", "backward of first",
        "sum 2 begins", "sum 3 begins",
    ]  # fmt: skip
    assert all(gradient.untyped_storage().nbytes() == gradient.itemsize for gradient in held), "no second set of them"
    found = made.whole(notes)
    assert notes.events[7:11] == [f"wait for {number}" for number in range(4)]
    assert set(found) == {id(first), id(second), id(third)} and id(unused) not in found
    for parameter, gradient in zip(read, once, strict=True):
        torch.testing.assert_close(found[id(parameter)], 2 * gradient)


def test_each_replica_steps_its_part_of_every_bucket() -> None:
    sizes, mesh = (3, 1, 5, 2), Mesh(dp=3)

    def work(rank: int, communicator: ThreadCommunicator) -> list[torch.Tensor]:
        own = weights(*sizes)
        flat = FlatWeights(buckets(own, 7 * FEATURES * 4), mesh.dp)
        before = [p.detach().clone() for p in own]
        assert all(torch.equal(p, q) for p, q in zip(before, weights(*sizes), strict=True))
        for parameter in own:
            start, stop = flat.range_of(parameter, rank)
            parameter.detach().view(-1)[start:stop] += 10 * (rank + 1)
        flat.gather(communicator)
        return [p.detach() - q for p, q in zip(own, before, strict=True)]

    first, *others = ThreadWorld(mesh).run(work)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    added = torch.cat([x.flatten() for x in first]).round()
    parts = [(10, 10, 8), (6, 6, 4)]  # of 28 and 16 elements
    assert [int((added == 10 * (rank + 1)).sum()) for rank in range(mesh.dp)] == [a + b for a, b in zip(*parts)]


def test_replicas_get_sums_of_their_parts_alone() -> None:
    """The other parts are nobody's business, and no numbers here."""
    sizes, mesh = (3, 1, 5, 2), Mesh(dp=3)

    def work(rank: int, communicator: ThreadCommunicator) -> None:
        own = weights(*sizes)
        scattered = {id(own[0]), id(own[2])}
        made = GradientBuckets(own, scattered=scattered, replicas=mesh.dp)
        flat = FlatWeights(made.members, mesh.dp)
        for parameter in own:
            made.add(parameter, parameter.detach() * (rank + 1))
        with made.taking(communicator):
            pass
        found = made.whole(communicator)
        for parameter in own:
            whole, parts = 6 * parameter.detach().view(-1), found[id(parameter)].view(-1)
            start, stop = flat.range_of(parameter, rank) if id(parameter) in scattered else (0, parameter.numel())
            torch.testing.assert_close(parts[start:stop], whole[start:stop])
            assert parts[:start].isnan().all() and parts[stop:].isnan().all()

    ThreadWorld(mesh).run(work)
