"""`ShardOptimizer`: a torch.optim optimizer over the slices of a model's parameters that a rank holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from autodist_fx.errors import AutodistError

# (name in the model, the rank's slice of it), as torch.optim's classes take them: functools.partial(AdamW, lr=1e-3)
OptimizerFactory = Callable[[list[tuple[str, nn.Parameter]]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]

# torch's optimizers whose step of an element depends on others of its tensor: on a slice they would do something else.
_NOT_BY_ELEMENT = ("Adafactor", "LBFGS", "Muon", "SparseAdam")


class ShardOptimizer:
    """The optimizer of one rank, made by `factory`, with the learning rate that `scheduler` makes of its own.

    A rank without trained parameters has none. Raises AutodistError for what is no optimizer of torch's kind, and for
    one that does not step each element by itself.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, nn.Parameter]],
        factory: OptimizerFactory,
        scheduler: SchedulerFactory | None,
    ) -> None:
        self._parameters = [p for _, p in parameters]
        self.torch_optimizer: Optimizer | None = None
        self._scheduler: LRScheduler | None = None
        if not parameters:
            return
        made = factory(list(parameters))
        if not isinstance(made, Optimizer):
            raise AutodistError(
                f"optimizer gave a {type(made).__name__}: give a function from parameters to a torch.optim.Optimizer, "
                "such as functools.partial(torch.optim.AdamW, lr=1e-4)"
            )
        kinds = [kind.__name__ for kind in type(made).__mro__ if kind.__module__.startswith("torch.optim")]
        if any(name in _NOT_BY_ELEMENT for name in kinds):
            raise AutodistError(
                f"{type(made).__name__} steps whole tensors, and a rank has slices of them: use one that steps each "
                "element by itself (AdamW, SGD, ...)"
            )
        self.torch_optimizer = made
        self._scheduler = None if scheduler is None else scheduler(made)

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """The learning rate of each group of parameters."""
        groups = [] if self.torch_optimizer is None else self.torch_optimizer.param_groups
        return tuple(float(group["lr"]) for group in groups)

    def step(self, gradients: Mapping[int, torch.Tensor]) -> None:
        """Step every parameter that has a gradient, by its id."""
        if self.torch_optimizer is None:
            return
        for parameter in self._parameters:
            parameter.grad = gradients.get(id(parameter))
        self.torch_optimizer.step()
        for parameter in self._parameters:
            parameter.grad = None  # it lies in a bucket, which the next step fills
        if self._scheduler is not None:
            self._scheduler.step()

    def state_of(self, parameter: nn.Parameter) -> Mapping[str, object]:
        """Return what the optimizer keeps of a parameter: tensors of its shape, and numbers; {} before its first
        step."""
        return {} if self.torch_optimizer is None else self.torch_optimizer.state.get(parameter, {})
