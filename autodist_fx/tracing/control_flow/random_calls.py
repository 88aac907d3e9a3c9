"""Random numbers while a model is traced: torch's are nodes of the graph, and those of Python are refused.

    torch.rand(x.shape[0], 1, 1)          a node, of which normalize makes one whose numbers depend on no mesh
    if torch.rand([]) < self.layerdrop    False where layerdrop is 0; else no graph has both outcomes (conditions.py)
    if random.uniform(0, 1) < 0.1         refused: the outcome of the trace would be that of every step
"""

from __future__ import annotations

import contextlib
import functools
import random
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from autodist_fx.errors import TracingError
from autodist_fx.tracing.versions.tracer_base import SymbolicTracer

_OF_PYTHON = ("random", "uniform", "randint", "randrange", "choice", "choices", "sample", "shuffle", "gauss")
_FACTORIES = ("rand", "randn", "randint", "randperm", "normal")  # those that take no tensor, but sizes
NAMES = frozenset({*_FACTORIES, "rand_like", "randn_like", "randint_like", "bernoulli", "multinomial", "uniform_"})


@contextlib.contextmanager
def drawn_in_graph(tracer: SymbolicTracer) -> Iterator[None]:
    """Let this thread's calls of torch's random factories be nodes of the graph that `tracer` is tracing."""
    before = {name: getattr(torch, name) for name in _FACTORIES}
    thread = threading.get_ident()

    def as_node(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread or getattr(tracer, "_disable_call_module", False):
                return function(*args, **kwargs)  # another thread's, or of the example of a node
            kwargs.setdefault("device", torch.device("meta"))  # an example draws nothing
            return tracer.create_proxy("call_function", function, args, kwargs)

        return wrapper

    for name, function in before.items():
        setattr(torch, name, as_node(function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(torch, name, function)


@contextlib.contextmanager
def refuse_python_draws(model: nn.Module, source_files: Collection[str]) -> Iterator[None]:
    """Raise TracingError where the model, in training mode, draws random numbers by itself: from torch's or numpy's
    generator (unless it seeds numpy's first), or, in one of `source_files`, from Python's. Generators are then as they
    were."""
    if not model.training:
        yield
        return
    drawn: list[str] = []
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    with _watched(drawn, source_files):
        yield
    if not torch.equal(torch_state, torch.get_rng_state()):
        torch.set_rng_state(torch_state)
        drawn.append("torch")
    if "seeded" not in drawn and not _same(numpy_state, np.random.get_state()):
        np.random.set_state(numpy_state)
        drawn.append("numpy.random")
    for name in drawn:
        if name != "seeded":
            raise TracingError(
                f"{type(model).__name__} draws from {name} in its Python when it is called in training mode "
                "(LayerDrop, SpecAugment, ...), and a graph would have one outcome for ever: set that probability in "
                "its config to 0, or call model.eval()"
            )


@contextlib.contextmanager
def _watched(drawn: list[str], source_files: Collection[str]) -> Iterator[None]:
    """Note in `drawn` the calls of Python's random functions that stand in `source_files`, and "seeded" where numpy's
    generator is."""
    before = {(random, name): getattr(random, name) for name in _OF_PYTHON}
    before[np.random, "seed"] = np.random.seed

    def watched(owner: Any, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if owner is np.random:
                drawn.append("seeded")
            elif sys._getframe(1).f_code.co_filename in source_files:
                drawn.append(f"random.{name}")
            return function(*args, **kwargs)

        return wrapper

    for (owner, name), function in before.items():
        setattr(owner, name, watched(owner, name, function))
    try:
        yield
    finally:
        for (owner, name), function in before.items():
            setattr(owner, name, function)


def _same(a: Any, b: Any) -> bool:
    """Return whether two states of numpy's generator are equal."""
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
