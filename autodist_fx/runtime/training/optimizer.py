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
from autodist_fx.runtime.training.flat_weights import Range

# (name in the model, the rank's slice of it), as torch.optim's classes take them: functools.partial(AdamW, lr=1e-3)
OptimizerFactory = Callable[[list[tuple[str, nn.Parameter]]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]

MASTER = "master_weight"  # the key of float32 weights beside the optimizer's own

# Optimizers, torch's and of others, whose step of an element depends on others of its tensor: on a slice they would do
# something else.
_NOT_BY_ELEMENT = (
    "Adafactor", "AdaLomo", "LAMB", "LARS", "LBFGS", "Lamb", "Lars", "Muon", "Shampoo", "SOAP", "SparseAdam",
)  # fmt: skip


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


@dataclass(frozen=True, slots=True)
class Stepped:
    """The elements [start, stop) of a parameter, flat, that this rank steps, as `weights`: the parameter itself, a part
    of its memory, or a copy of that in float32."""

    parameter: nn.Parameter
    start: int
    stop: int
    weights: nn.Parameter

    @property
    def is_master(self) -> bool:
        """True if `weights` are a copy, which the parameter is rounded from."""
        return self.weights.dtype != self.parameter.dtype

    def part_of(self, whole: torch.Tensor) -> torch.Tensor:
        """Return these elements of a tensor that lies as the parameter does, in the shape of `weights`."""
        if whole.shape == self.weights.shape:
            return whole
        return whole.reshape(-1)[self.start : self.stop]


def wants_master(dtype: torch.dtype) -> bool:
    """Return whether parameters are of a dtype in which small steps are lost."""
    return dtype in (torch.bfloat16, torch.float16)


class ShardOptimizer:
    """The optimizer of one rank, made by `factory`, with the learning rate that `scheduler` makes of its own.

    `factory` is given the rank's slices in their own shapes, so that it may group them. `range_of` says which elements
    of each are stepped here, None: all. With `masters`, parameters of 16 bits are stepped in float32, and rounded. A
    rank without trained parameters has no optimizer. Raises AutodistError for what is no optimizer of torch's kind, and
    for one that does not step each element by itself.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, nn.Parameter]],
        factory: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        *,
        range_of: Callable[[nn.Parameter], Range] | None = None,
        masters: bool = False,
    ) -> None:
        self.torch_optimizer: Optimizer | None = None
        self._scheduler: LRScheduler | None = None
        self._stepped = {id(p): found for _, p in parameters if (found := _stepped(p, range_of, masters)) is not None}
        if not parameters:
            return
        made = factory(list(parameters))
        if not isinstance(made, Optimizer):
            raise AutodistError(
                f"optimizer gave a {type(made).__name__}: give a function from parameters to a torch.optim.Optimizer, "
                "such as functools.partial(torch.optim.AdamW, lr=1e-4)"
            )
        if any(kind.__name__ in _NOT_BY_ELEMENT for kind in type(made).__mro__):
            raise AutodistError(
                f"{type(made).__name__} steps whole tensors, and a rank has slices of them: use one that steps each "
                "element by itself (AdamW, SGD, ...)"
            )
        self._put_stepped(made)
        self.torch_optimizer = made
        self._scheduler = None if scheduler is None else scheduler(made)

    def _put_stepped(self, made: Optimizer) -> None:
        """Have the optimizer step what this rank steps, instead of the parameters that it was made for."""
        for group in made.param_groups:
            kept = [n for n, p in enumerate(group["params"]) if id(p) in self._stepped]
            group["params"] = [self._stepped[id(group["params"][n])].weights for n in kept]
            if "param_names" in group:
                group["param_names"] = [group["param_names"][n] for n in kept]
        for parameter in list(made.state):  # most optimizers have none before their first step
            state, found = made.state.pop(parameter), self._stepped.get(id(parameter))
            if found is not None:
                made.state[found.weights] = {key: _part_of_state(found, value) for key, value in state.items()}

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """The learning rate of each group of parameters."""
        groups = [] if self.torch_optimizer is None else self.torch_optimizer.param_groups
        return tuple(float(group["lr"]) for group in groups)

    @property
    def nbytes(self) -> int:
        """Bytes of all that this rank keeps to step with: the optimizer's states, and float32 copies of weights."""
        states = [] if self.torch_optimizer is None else self.torch_optimizer.state.values()
        of_states = sum(x.nbytes for state in states for x in state.values() if isinstance(x, torch.Tensor))
        return of_states + sum(s.weights.nbytes for s in self._stepped.values() if s.is_master)

    def step(self, gradients: Mapping[int, torch.Tensor]) -> None:
        """Step what this rank steps of every parameter that has a gradient, by its id."""
        if self.torch_optimizer is None:
            return
        for stepped in self._stepped.values():
            gradient = gradients.get(id(stepped.parameter))
            stepped.weights.grad = None if gradient is None else stepped.part_of(gradient)
        self.torch_optimizer.step()
        with torch.no_grad():
            for stepped in self._stepped.values():
                if stepped.is_master and stepped.weights.grad is not None:
                    stepped.part_of(stepped.parameter.detach()).copy_(stepped.weights)
                stepped.weights.grad = None  # it lies in a bucket, which the next step fills
        if self._scheduler is not None:
            self._scheduler.step()

    def stepped_of(self, parameter: nn.Parameter) -> Stepped | None:
        """Return the part of a parameter that this rank steps; None where it steps none."""
        return self._stepped.get(id(parameter))

    def state_of(self, parameter: nn.Parameter) -> Mapping[str, object]:
        """Return what the optimizer keeps of the part of a parameter that this rank steps: tensors in the shape of its
        `Stepped.weights`, and numbers; {} before its first step."""
        stepped = self._stepped.get(id(parameter))
        if stepped is None or self.torch_optimizer is None:
            return {}
        return self.torch_optimizer.state.get(stepped.weights, {})

    def put_state(self, parameter: nn.Parameter, state: Mapping[str, Any]) -> None:
        """Let the optimizer keep this of what it steps of a parameter, and nothing else: tensors of the parameter's
        shape, and numbers; under MASTER its float32 weights, else they are the parameter's."""
        stepped, made = self._stepped.get(id(parameter)), self.torch_optimizer
        if stepped is None:
            return
        assert made is not None
        if stepped.is_master:
            with torch.no_grad():
                stepped.weights.copy_(stepped.part_of(state.get(MASTER, parameter.detach())))
        group = next(g for g in made.param_groups if any(p is stepped.weights for p in g["params"]))
        beside = group.get("capturable") or group.get("fused")  # else torch reads numbers on the CPU
        made.state[stepped.weights] = {
            key: value.to(parameter.device) if isinstance(value, torch.Tensor) and (value.dim() or beside) else value
            for key, value in ((k, _part_of_state(stepped, v)) for k, v in state.items() if k != MASTER)
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


def _stepped(
    parameter: nn.Parameter, range_of: Callable[[nn.Parameter], Range] | None, masters: bool
) -> Stepped | None:
    start, stop = (0, parameter.numel()) if range_of is None else range_of(parameter)
    if start == stop and parameter.numel():
        return None
    is_whole, is_master = stop - start == parameter.numel(), masters and wants_master(parameter.dtype)
    if is_whole and not is_master:
        return Stepped(parameter, start, stop, parameter)
    part = parameter.detach() if is_whole else parameter.detach().view(-1)[start:stop]
    weights = nn.Parameter(part.float() if is_master else part)
    return Stepped(parameter, start, stop, weights)


def _part_of_state(stepped: Stepped, value: object) -> object:
    """Return what a state that was made for a whole parameter is for what is stepped of it."""
    if not isinstance(value, torch.Tensor) or value.shape != stepped.parameter.shape:
        return value
    part = stepped.part_of(value)
    return part.to(stepped.weights.dtype if part.dtype == stepped.parameter.dtype else part.dtype, copy=True)
