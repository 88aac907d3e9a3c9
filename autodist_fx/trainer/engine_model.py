"""`EngineModel`: the model that a Trainer's loops call, which is the engine's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from autodist_fx.training.engine import Engine


class EngineModel(nn.Module):
    """Stands for a split model where it is evaluated, counted and switched between modes. `stands_for` has the
    parameters that a user sees."""

    def __init__(self, engine: Callable[[], Engine], stands_for: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "engine", engine)
        object.__setattr__(self, "stands_for", stands_for)  # no submodule

    def forward(self, **inputs: Any) -> Any:
        """Return what the model in evaluation mode returns."""
        return self.__dict__["engine"]().evaluate({name: x for name, x in inputs.items() if x is not None})

    def train(self, mode: bool = True) -> EngineModel:
        """Switch the mode of what it stands for, by which subclasses know what the loop does; the engine needs none."""
        self.__dict__["stands_for"].train(mode)
        return self

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self.__dict__["stands_for"].parameters(recurse)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["stands_for"], name)
