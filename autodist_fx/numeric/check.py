"""One call of a traced form of a model: the model's own graph and all ranks run in float64 on the same inputs, and what
leaves a rank is what the model returns, to 1e-8 of its largest element."""

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
class Form:
    """One traced form of a model: its graph, and the programs of all ranks."""

    whole: torch.fx.GraphModule
    names: Mapping[int, str]  # passes.op_graph.build.parameter_names of the model
    plan: PartitionPlan
    programs: Sequence[RankProgram]
    layer_kinds: Sequence[str]

    def whole_program(self) -> RankProgram:
        """The model's graph as the program of the one rank of a mesh of one."""
        inputs = tuple(str(n.target) for n in self.whole.graph.nodes if n.op == "placeholder")
        layers = range(len(self.layer_kinds))
        return RankProgram(0, Mesh(1, 1), self.whole, inputs, {}, tuple(layers), tuple(self.layer_kinds))


def drawn_weights(form: Form, buffers: Mapping[str, torch.Tensor], seed: int = 0) -> Weights:
    """For all forms of a model: `form` is one that has all its parameters."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in form.whole.named_parameters(remove_duplicate=False):
        shapes.setdefault(form.names.get(id(tensor), name), tuple(tensor.shape))
    return Weights(shapes, buffers, seed)


def check_call(
    form: Form,
    weights: Weights,
    inputs: Mapping[str, Any],
    caches: Sequence[Any] | None = None,
    *,
    locate: bool = False,
) -> dict[str, Any]:
    """Run the model and all ranks on the same inputs (and each on its own of `caches`); the model's outputs.

    Raises VerificationError, which names the rank, the output, and with `locate` (which keeps every value) the first
    node that differs; AutodistError where the model's own graph refuses these inputs.
    """
    given: list[Mapping[str, Any]] = [
        inputs if caches is None else {**inputs, "past_key_values": cache}
        for cache in (caches if caches is not None else [None] * (1 + len(form.programs)))
    ]
    with torch.no_grad(), double_by_default():
        whole = Doubles(form.whole, of_whole(form.whole, form.names, weights), keep=locate)
        try:
            expected = whole.values(given[0])
        except Exception as error:
            raise refusal(form, error) from error
        ranks = [Doubles(p.graph_module, of_rank(p, weights), keep=locate) for p in form.programs]
        wrong = _run_ranks(form, ranks, given[1:], expected)
    if wrong:
        found = first_difference(form.plan, form.programs, whole, ranks) if locate else None
        if found is None:
            raise VerificationError(wrong)
        program, node = found
        raise with_lines(program, node, f"{wrong}; the first to differ is {on_rank(program)}, {described(node)}")
    return expected  # type: ignore[no-any-return]


def _run_ranks(
    form: Form, ranks: Sequence[Doubles], given: Sequence[Mapping[str, Any]], expected: Mapping[str, Any]
) -> str:
    """What is wrong, "" for nothing."""

    def run(rank: int, communicator: ThreadCommunicator) -> Any:
        with using(communicator):
            return ranks[rank].values(given[rank])

    try:
        outputs = ThreadWorld(form.plan.mesh).run(run)
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
    """What the ranks' failing says."""
    if isinstance(error, AutodistError) and not isinstance(error, CommunicationError):
        raise error  # the check's own limits
    notes = " ".join(getattr(error, "__notes__", ()))
    return f"run in float64, the ranks fail: {type(error).__name__}: {' '.join(str(error).split())[:300]} {notes}"


def refusal(form: Form, error: Exception) -> AutodistError:
    """What to raise where the model itself fails."""
    if isinstance(error, AutodistError):
        return error
    return AutodistError(f"the numeric check could not run {form.plan.model} itself on made-up inputs: {error}")


def _tensors(outputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Outputs that are tensors, by name; those in tuples by name and place."""
    found = {}
    for name, value in outputs.items():
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, (tuple, list)):
            found |= {f"{name}.{i}": v for i, v in enumerate(value) if isinstance(v, torch.Tensor)}
    return found


def difference(found: torch.Tensor, wanted: torch.Tensor, largest: float | None = None) -> float:
    """The largest, relative to `largest`, by default that of `wanted`; NaN equals NaN; infinite for another shape."""
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


