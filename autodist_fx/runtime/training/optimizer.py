"""`ShardOptimizer`: a torch.optim optimizer over the slices of a model's parameters that a rank holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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

# Options of a group of parameters that say how it is stepped, and not what comes of it.
_HOW = ("params", "param_names", "foreach", "fused", "capturable", "differentiable")


@dataclass(frozen=True, slots=True)
class OptimizerOptions:
    """The options of an optimizer beside the states of its parameters: its class, the options of each group ("lr"),
    and the class and the state of the scheduler of learning rates, "" and None without one."""

    optimizer: str
    groups: tuple[Mapping[str, Any], ...]
    scheduler: str = ""
    scheduler_state: Mapping[str, Any] | None = None


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

    def put_state(self, parameter: nn.Parameter, state: Mapping[str, Any]) -> None:
        """Let the optimizer keep this of a parameter that it steps, and nothing else: tensors of its shape, and
        numbers."""
        made = self.torch_optimizer
        assert made is not None
        group = next(g for g in made.param_groups if any(p is parameter for p in g["params"]))
        beside = group.get("capturable") or group.get("fused")  # else torch reads numbers on the CPU
        made.state[parameter] = {
            key: value.to(parameter.device) if isinstance(value, torch.Tensor) and (value.dim() or beside) else value
            for key, value in state.items()
        }

    def options(self) -> OptimizerOptions | None:
        """Return the options of optimizer and scheduler as they are now; None for a rank without trained parameters."""
        made, scheduler = self.torch_optimizer, self._scheduler
        if made is None:
            return None
        groups = tuple({k: v for k, v in group.items() if k not in _HOW} for group in made.param_groups)
        if scheduler is None:
            return OptimizerOptions(type(made).__name__, groups)
        return OptimizerOptions(type(made).__name__, groups, type(scheduler).__name__, scheduler.state_dict())

    def put_options(self, saved: OptimizerOptions) -> None:
        """Go on with these options. Raises AutodistError where they are of other classes, or of other groups."""
        own = self.options()
        if own is None:
            return
        for what, theirs, mine in (
            ("optimizer", saved.optimizer, own.optimizer), ("lr_scheduler", saved.scheduler, own.scheduler),
            ("groups of parameters", len(saved.groups), len(own.groups)),
        ):  # fmt: skip
            if theirs != mine:
                raise AutodistError(
                    f"the {what} of the saved run: {theirs or 'none'}, and of this one: {mine or 'none'}; go on with "
                    "what it was begun with"
                )
        assert self.torch_optimizer is not None
        if self._scheduler is not None:
            self._scheduler.load_state_dict(dict(saved.scheduler_state or {}))
        for group, options in zip(self.torch_optimizer.param_groups, saved.groups, strict=True):
            for name, value in options.items():
                if isinstance(group.get(name), torch.Tensor):
                    group[name].fill_(value)  # a compiled step reads this tensor
                else:
                    group[name] = value
