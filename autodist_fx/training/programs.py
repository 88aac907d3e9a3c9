"""`TrainingPrograms`: the programs of a model in training, made for what a step's microbatches are."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from autodist_fx.calls.call import Call, read_call
from autodist_fx.calls.input_spec import InputSpec
from autodist_fx.calls.input_specs import specs_of
from autodist_fx.calls.lengths import lengths_of
from autodist_fx.calls.model_signature import signature_of
from autodist_fx.compiler.compilation import Compilation
from autodist_fx.compiler.compile_options import CompileOptions
from autodist_fx.compiler.examples import planned_graph
from autodist_fx.compiler.source import TracingSource
from autodist_fx.compiler.torch_state import compiler_state
from autodist_fx.compiler.variant import Variant
from autodist_fx.errors import AutodistError
from autodist_fx.tracing import input_facts
from cost_model.partition_plan import PartitionPlan
from cost_model.request.plan_request import PlanRequest
from cost_model.schedule.schedule import Schedule
from cost_model.training.estimate import StepEstimate, StepSetup, estimate_step
from cost_model.training.stage_work import WorkAnalysis
from passes.losses.divide_losses import LOSS, SHARE
from passes.verify.schedule import verify_schedule


@dataclass(frozen=True, slots=True)
class ReadBatch:
    """A batch as the model's forward takes it, and the specs of its tensors."""

    call: Call
    specs: Mapping[str, InputSpec]


class TrainingPrograms:
    """Compiles a model for the inputs that it is trained with; `model`, on meta and in training mode, says how.

    The first inputs decide the plan; later ones that need a graph of their own get one whose weights lie alike. Of a
    model in evaluation mode the programs evaluate: they give all outputs, and their losses are whole.
    """

    def __init__(
        self, model: PreTrainedModel, request: PlanRequest, plan: PartitionPlan | None, options: CompileOptions
    ) -> None:
        _refuse_statistics(model)
        self.model, trains = model, model.training
        self._request, self._plan = request, plan
        self._options = replace(options, train=trains, in_parts=trains, use_cache=False, verify=False)
        self._signature, self._facts = signature_of(model), input_facts(model)
        self._compiled: Compilation | None = None

    @property
    def compiled(self) -> Compilation:
        """The compilation, of all variants so far. Raises AutodistError before the first step."""
        if self._compiled is None:
            raise AutodistError("the model is split at the first step, for the inputs that it gets: call step first")
        return self._compiled

    def read(self, batch: Mapping[str, Any]) -> ReadBatch:
        """Sort a batch into tensors and options. Raises AutodistError that names an argument which has no use here."""
        call = read_call(self._signature, dict(batch), {})
        if call.use_cache:
            raise AutodistError("a model is trained on whole sequences: leave past_key_values and use_cache out")
        return ReadBatch(call, specs_of(call.tensors, self._facts, 0))

    @compiler_state()
    def variant_for(self, batch: ReadBatch) -> Variant:
        """Return the variant for a microbatch, made where there is none yet; not verified. Raises AutodistError for one
        that has no loss."""
        if self._compiled is None:
            lengths = lengths_of(batch.specs, batch.call.tensors, 0)
            sizes = {symbol: n for symbol, n in lengths.items() if symbol in "BSE"}
            request = replace(self._request, sizes=tuple((sizes | dict(self._request.sizes)).items()))
            fixed = tuple(batch.call.fixed.items())
            options = replace(self._options, input_names=tuple(batch.specs), concrete_args=fixed)
            source = TracingSource(self.model, request, options, self._plan, batch.specs)
            self._compiled = Compilation(source, options)
        variant = self._compiled.variant_for(batch.call, 0)
        if self.model.training and LOSS not in variant.output_order:
            raise AutodistError(
                f"{variant.traced.model_class} returned no loss: give what it computes one from (labels=...)"
            )
        return variant

    def estimate(self, batch: ReadBatch, setup: StepSetup) -> StepEstimate:
        """Predict a step of microbatches like this one; `setup.rows` is left to it."""
        variant = self.variant_for(batch)
        lengths = lengths_of(batch.specs, batch.call.tensors, 0)
        request = replace(self._request, sizes=tuple(lengths.items()), ranks_at_once=setup.mesh.size)
        graph = planned_graph(variant.traced, trains=True)
        analysis = WorkAnalysis(graph, variant.plan, request, lengths["B"], {})
        return estimate_step(analysis, replace(setup, rows=lengths["B"]))

    def limit(self) -> int:
        """Return the bytes that training may take on the smallest device."""
        return min(self._request.limits)

    def for_evaluation(self) -> TrainingPrograms:
        """Return the programs that evaluate the same model, whose weights lie as these have them."""
        request = replace(self._request, like=self.compiled.plan)
        return TrainingPrograms(copy.deepcopy(self.model).eval(), request, None, self._options)

    def is_known(self, batch: ReadBatch) -> bool:
        """Return whether there is a variant for a microbatch already."""
        return self._compiled is not None and self._compiled.known_for(batch.call, 0) is not None

    def verify(self, variant: Variant) -> None:
        """Prove the programs of all ranks. Raises VerificationError."""
        self.compiled.verify_variant(variant)

    def verify_schedule(self, replicas: Iterable[Sequence[Variant]], schedule: Schedule) -> None:
        """Prove that the ranks' programs, run in the order of a schedule, never wait for each other for ever.

        `replicas`: the variant of each microbatch of a replica. Raises VerificationError.
        """
        for variants in replicas:
            verify_schedule([self.compiled.all_programs(variant) for variant in variants], schedule)


@torch.no_grad()
def loss_inputs(parts: list[tuple[Variant, Mapping[str, Any]]]) -> dict[str, torch.Tensor]:
    """Return the inputs that the losses of all parts of a batch are divided by (passes.losses.divide_losses.py).

    `parts`: each microbatch of each replica. Raises AutodistError where nothing of the batch counts.
    """
    totals: dict[str, float] = {}
    dtypes: dict[str, torch.dtype] = {}
    for variant, inputs in parts:
        assert variant.losses is not None
        dtypes |= variant.losses.inputs
        if (counts := variant.losses.counts) is not None:
            taken = {str(n.target): inputs.get(str(n.target)) for n in counts.graph.nodes if n.op == "placeholder"}
            for name, count in counts(**taken).items():
                totals[name] = totals.get(name, 0) + (count.item() if isinstance(count, torch.Tensor) else count)
    if none := next((name for name, number in totals.items() if not number), None):
        raise AutodistError(f"no label of this batch counts ({none}): all of them are ignored, and the loss is 0 / 0")
    totals[SHARE] = 1 / len(parts)
    return {name: torch.tensor(totals[name], dtype=dtype) for name, dtype in dtypes.items()}


def _refuse_statistics(model: nn.Module) -> None:
    """Raise AutodistError for modules that keep statistics of a batch, which microbatches and replicas would each have
    of their own."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training and module.track_running_stats:
            raise AutodistError(
                f"{name} ({type(module).__name__}) normalizes by the statistics of a batch, and each microbatch would "
                "have its own: replace it, by torchvision's FrozenBatchNorm2d for example"
            )
