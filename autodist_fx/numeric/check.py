"""Compares one call of one variant: the model's own graph and all ranks run in float64 on the same inputs.

Each output of a rank must equal the model's output of that name, to 1e-8 of the latter's largest element.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from autodist_fx.errors import AutodistError, CommunicationError
from autodist_fx.numeric.float64_interpreter import Doubles, Weights, double_by_default, of_rank, of_whole
from autodist_fx.numeric.locate import first_difference
from autodist_fx.simulation.thread_communicator import ThreadCommunicator, ThreadWorld
from cost_model.errors import VerificationError
from cost_model.mesh import Mesh
from cost_model.partition_plan import PartitionPlan
from passes.ops.comm import using
from passes.program.rank_program import RankProgram
from passes.verify.core.report import described, on_rank, with_lines

TOLERANCE = 1e-8


@dataclass(frozen=True, slots=True)
class CheckedVariant:
    """A variant under a numeric check: the model's graph, its plan, and the programs of all ranks."""

    whole: torch.fx.GraphModule
    names: Mapping[int, str]  # passes.op_graph.build.parameter_names of the model
    plan: PartitionPlan
    programs: Sequence[RankProgram]
    layer_kinds: Sequence[str]

    def whole_program(self) -> RankProgram:
        """Wrap the whole graph as the program of the one rank of a 1 x 1 mesh."""
        inputs = tuple(str(n.target) for n in self.whole.graph.nodes if n.op == "placeholder")
        layers = range(len(self.layer_kinds))
        return RankProgram(0, Mesh(1, 1), self.whole, inputs, {}, tuple(layers), tuple(self.layer_kinds))


def drawn_weights(checked: CheckedVariant, buffers: Mapping[str, torch.Tensor], seed: int = 0) -> Weights:
    """Draw float64 weights for all variants of a model; `checked` has all of its parameters. See Weights."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in checked.whole.named_parameters(remove_duplicate=False):
        shapes.setdefault(checked.names.get(id(tensor), name), tuple(tensor.shape))
    return Weights(shapes, buffers, seed)


def check_call(
    checked: CheckedVariant,
    weights: Weights,
    inputs: Mapping[str, Any],
    caches: Sequence[Any] | None = None,
    *,
    locate: bool = False,
) -> dict[str, Any]:
    """Run the model's graph and all ranks on the same inputs, each with its own entry of `caches`, and return the
    model's outputs: float64 tensors by name, in their true shapes.

    Raises VerificationError, which names the rank, the output, and with `locate` (which keeps every value) the first
    node that differs; AutodistError where the model's own graph refuses these inputs.
    """
    inputs_of_runs: list[Mapping[str, Any]] = [  # the model's own graph first, then the ranks
        inputs if caches is None else {**inputs, "past_key_values": cache}
        for cache in (caches if caches is not None else [None] * (1 + len(checked.programs)))
    ]
    with torch.no_grad(), double_by_default():
        whole = Doubles(checked.whole, of_whole(checked.whole, checked.names, weights), keep=locate)
        try:
            expected = whole.values(inputs_of_runs[0])
        except Exception as error:
            raise refusal(checked, error) from error
        ranks = [Doubles(p.graph_module, of_rank(p, weights), keep=locate) for p in checked.programs]
        wrong = _run_ranks(checked, ranks, inputs_of_runs[1:], expected)
    if wrong:
        place = first_difference(checked.plan, checked.programs, whole, ranks) if locate else None
        if place is None:
            raise VerificationError(wrong)
        program, node = place
        raise with_lines(program, node, f"{wrong}; the first to differ is {on_rank(program)}, {described(node)}")
    return expected


def _run_ranks(
    checked: CheckedVariant, ranks: Sequence[Doubles], inputs: Sequence[Mapping[str, Any]], expected: Mapping[str, Any]
) -> str:
    """Run all ranks in threads and compare their outputs; return
    the first difference as a sentence, "" where there is none."""

    def run(rank: int, communicator: ThreadCommunicator) -> Any:
        with using(communicator):
            return ranks[rank].values(inputs[rank])

    try:
        outputs = ThreadWorld(checked.plan.mesh).run(run)
    except Exception as error:
        return failure(error)
    missing = set(_tensors(expected))
    for rank, own in enumerate(outputs):
        for name, value in _tensors(own).items():
            wanted = _tensors(expected).get(name)
            if wanted is None:
                return f"rank {rank} returns {name}, which the model does not return"
            apart = difference(value, wanted)
            if apart > TOLERANCE:
                return f"{name} of rank {rank} differs from the model's, by {apart:.1e} of its largest element"
            missing.discard(name)
    return f"no rank returns {sorted(missing)[0]}" if missing else ""


def failure(error: Exception) -> str:
    """Turn an exception of the ranks into a sentence. Raises AutodistError for a limit of the check itself."""
    if isinstance(error, AutodistError) and not isinstance(error, CommunicationError):
        raise error  # the check's own limits
    notes = " ".join(getattr(error, "__notes__", ()))
    return f"run in float64, the ranks fail: {type(error).__name__}: {' '.join(str(error).split())[:300]} {notes}"


def refusal(checked: CheckedVariant, error: Exception) -> AutodistError:
    """Return the AutodistError to raise where the model's own graph fails on these inputs."""
    if isinstance(error, AutodistError):
        return error
    return AutodistError(f"the numeric check could not run {checked.plan.model} itself on made-up inputs: {error}")


def _tensors(outputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the outputs that are tensors, by name; those inside tuples by name and index."""
    found = {}
    for name, value in outputs.items():
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, (tuple, list)):
            found |= {f"{name}.{i}": v for i, v in enumerate(value) if isinstance(v, torch.Tensor)}
    return found


def difference(found: torch.Tensor, wanted: torch.Tensor, largest: float | None = None) -> float:
    """Return the largest absolute difference of two tensors,
    relative to `largest` (by default the largest of |wanted|).

    NaN equals NaN, and an infinity the same infinity. The result is inf for tensors of different shapes, for one that
    is floating-point and one that is not, and for unequal integers.
    """
    if found.shape != wanted.shape or found.is_floating_point() != wanted.is_floating_point():
        return float("inf")
    if wanted.numel() == 0:
        return 0.0
    if not wanted.is_floating_point():
        return 0.0 if torch.equal(found, wanted) else float("inf")
    finite = wanted.isfinite()
    same = torch.where(finite, found.isfinite(), (found == wanted) | (found.isnan() & wanted.isnan()))
    if not bool(same.all()):
        return float("inf")
    if largest is None:
        largest = float(torch.where(finite, wanted, 0).abs().max())
    return float(torch.where(finite, found - wanted, 0).abs().max()) / max(largest, 1e-300)


