"""Trains a split model and the whole one side by side, in float64, and compares them after each step.

The truth is transformers' model and torch.optim in one process: each batch's own loss, weighted by the labels that
count in it, one backward pass, clipping by the whole norm, AdamW. Where training mode draws random numbers, the truth
is the same engine on one rank, whose masks are torch's in rate and not in place.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel

from autodist_fx.calls.input_shapes import answers_once
from autodist_fx.errors import AutodistError
from autodist_fx.tracing import empty_model
from autodist_fx.training.engine import Engine, StepResult
from autodist_fx.training.gathered import TrainingState
from cost_model.errors import VerificationError
from cost_model.format import bytes_text

Batch = Mapping[str, torch.Tensor]

MAX_NORM = 0.5  # far below what random weights have, so that every step is clipped
LENGTHS = (11, 6)  # of the two batches that each step accumulates
_COPIES = 11  # of the weights: the drawn model; on both sides weights, gradients, two states; the gathered state
_SMALLEST = 1e-6  # of the largest tensor of its kind: below it an error is rounding (a bias of keys has no gradient)
adamw = functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)


@dataclass(frozen=True, slots=True)
class ComparedStep:
    """A step on which both agree: its number, its loss, and the largest relative error of any tensor, by name."""

    step: int
    loss: float
    error: float
    tensor: str


class OneProcess(Protocol):
    """A truth that the split model is held against."""

    def step(self, window: Sequence[Batch]) -> StepResult: ...

    def state(self) -> TrainingState: ...


def compare_steps(
    model: PreTrainedModel, engine: Engine, truth: OneProcess, steps: int, rows: int, tolerance: float
) -> Iterator[ComparedStep]:
    """Take `steps` steps on both, of two batches of `rows` rows and of two lengths each, padded at the end.

    Yield each step on which loss, norm of the gradient, every parameter and every state of AdamW (which holds every
    gradient) agree to within `tolerance`. Raises VerificationError, which names the step and the first parameter, in
    the model's order, that differs; AutodistError for a model that reads anything but tokens.
    """
    for number in range(1, steps + 1):
        window = [_batch(model, rows, length, 2 * number + k) for k, length in enumerate(LENGTHS)]
        wanted, got = truth.step(window), engine.step(window)
        for name in ("loss", "grad_norm"):
            ours, theirs = getattr(got, name), getattr(wanted, name)
            if not abs(ours - theirs) <= tolerance * abs(theirs):
                _differ(number, "the loss" if name == "loss" else "the norm of the gradient", ours, theirs)
        errors = state_errors(engine.gather(), truth.state())
        for tensor, error in errors.items():
            if not error <= tolerance:
                raise VerificationError(f"step {number}: {tensor} differs from one process's by {error:.2g}")
        worst = max(errors, key=lambda tensor: errors[tensor])
        yield ComparedStep(number, got.loss, errors[worst], worst)


def drawn_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return the model that a config describes, in float64, every parameter drawn: biases and scales, too, which
    would otherwise hide what is added or multiplied twice. Raises AutodistError where it is too large to train here."""
    shape = empty_model(config)
    needs = 8 * _COPIES * sum(p.numel() for p in shape.parameters())
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needs > has:
        raise AutodistError(
            f"two models in float64, with gradients and states, take about {bytes_text(needs)}, and this machine has "
            f"{bytes_text(has)}: compare a config with fewer layers, whose ranks' programs are as these"
        )
    with torch.random.fork_rng(devices=()):
        model = type(shape)(copy.deepcopy(config)).to(torch.float64)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # torch's grouped products know no float64
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.copy_(noise * 0.3 + (1.0 if name.endswith("weight") else 0.0))
    return model


def tolerance_of(model: PreTrainedModel) -> float:
    """Return 1e-9, or 1e-6 for a model that computes some of its forward pass in a dtype of fewer bits."""
    watch = _Narrow()
    with torch.random.fork_rng(devices=()), torch.no_grad(), watch:
        model(**_batch(model, 2, LENGTHS[0], 0))
    return 1e-6 if watch.found else 1e-9


class _Narrow(TorchDispatchMode):
    """Watch for floating-point results of fewer bits than float64."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            self.found |= isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return result


def truth_of(model: PreTrainedModel, on_one_rank: Engine) -> tuple[OneProcess, str]:
    """Return (what a split model is held against, its name): transformers, or, where `model` draws random numbers in
    training mode, `on_one_rank`."""
    batch = dict(_batch(model, 2, LENGTHS[0], 0))
    whole = copy.deepcopy(model).train()
    with torch.random.fork_rng(devices=()), torch.no_grad():
        first, second = (float(whole(**batch).loss) for _ in range(2))
    if first == second:
        return _Plain(whole), "transformers and torch.optim in one process"
    return _OneRank(on_one_rank), "one rank, since training mode draws random numbers"


def state_errors(got: TrainingState, wanted: TrainingState) -> dict[str, float]:
    """Return the largest error of each tensor, by "name" or "name, state", relative to its largest element.

    In the order of the model's parameters. A tensor that one of them lacks has an infinite error.
    """
    largest: dict[str, float] = {}
    pairs: list[tuple[str, str, torch.Tensor | None, torch.Tensor]] = []
    for name, value in wanted.parameters.items():
        states = wanted.optimizer.get(name, {})
        pairs.append((name, "", got.parameters.get(name), value))
        pairs += [(name, key, got.optimizer.get(name, {}).get(key), x) for key, x in states.items()]
    for _, key, _, value in pairs:
        largest[key] = max(largest.get(key, 0.0), float(value.abs().max()) if value.numel() else 0.0)
    errors = {
        f"{name}, {key}" if key else name: _error(ours, theirs, largest[key]) for name, key, ours, theirs in pairs
    }
    more = got.optimizer.keys() - wanted.optimizer.keys()
    return errors | {f"{name}, which one process does not step": float("inf") for name in sorted(more)}


def _error(ours: torch.Tensor | None, theirs: torch.Tensor, largest: float) -> float:
    if ours is None or ours.shape != theirs.shape:
        return float("inf")
    if not theirs.numel():
        return 0.0
    scale = max(float(theirs.abs().max()), _SMALLEST * largest)
    return float((ours - theirs).abs().max()) / scale if scale else 0.0


def _differ(step: int, what: str, ours: float, theirs: float) -> None:
    raise VerificationError(f"step {step}: {what} is {ours:.12g}, and {theirs:.12g} in one process")


class _Plain:
    """transformers' model and torch.optim."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._optimizer = adamw([p for p in model.parameters() if p.requires_grad])
        self._steps = 0

    def step(self, window: Sequence[Batch]) -> StepResult:
        counts = [_labels_that_count(self._model, batch) for batch in window]
        loss = sum(self._model(**batch).loss * (n / sum(counts)) for batch, n in zip(window, counts, strict=True))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), MAX_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._steps += 1
        return StepResult(self._steps, float(loss.detach()), float(norm))

    def state(self) -> TrainingState:
        named = dict(self._model.named_parameters())
        kept = {name: self._optimizer.state[p] for name, p in named.items() if self._optimizer.state.get(p)}
        return TrainingState({name: p.detach() for name, p in named.items()}, kept)


class _OneRank:
    """An engine on one rank."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def step(self, window: Sequence[Batch]) -> StepResult:
        return self._engine.step(window)

    def state(self) -> TrainingState:
        return self._engine.gather()


# -- batches -----------------------------------------------------------------------------------------------------------


def _batch(model: PreTrainedModel, rows: int, length: int, seed: int) -> Batch:
    """Return token ids, a mask that leaves out the ends of some rows, and labels. Raises AutodistError for a model
    whose main input is something else."""
    config = model.config.get_text_config()
    if model.main_input_name != "input_ids":
        raise AutodistError(
            f"{type(model).__name__} reads {model.main_input_name}: steps are compared for models that read tokens"
        )
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, config.vocab_size, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows // 2):
        mask[row, length - 1 - row % (length // 2) :] = 0
    if answers_once(type(model).__name__):
        labels = torch.randint(model.config.num_labels, (rows,), generator=generator)
    else:
        labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _labels_that_count(model: PreTrainedModel, batch: Batch) -> int:
    """Return how many labels the mean in the model's loss is over: a causal language model's first one is no next
    token."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    labels: Any = batch["labels"]
    if labels.dim() == 1:
        return len(labels)
    is_next = type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return int(((labels[:, 1:] if is_next else labels) != -100).sum())
