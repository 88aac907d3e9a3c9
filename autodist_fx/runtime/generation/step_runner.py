"""`StepRunner`: what every rank does with a step, whether it leads the generation, follows, or neither.

`DistributedCausalLM` and its subclasses are StepRunners. `forward` (causal_lm.py) chooses a program by the guards,
announces the step and runs it; a Follower calls `run_step`, which chooses and runs. The guards of a step are evaluated
once on each rank, in `_choose`, and the variant that they choose is handed on to `run_variant`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule
from transformers import GenerationConfig, PretrainedConfig

from autodist_fx.calls.call import Call
from autodist_fx.calls.lengths import Lengths
from autodist_fx.calls.outputs import CallOutput, returned
from autodist_fx.errors import AutodistError
from autodist_fx.large_memory import give_back_freed
from autodist_fx.runtime.cache.cache_table import CacheTable
from autodist_fx.runtime.cache.cross_cache import Encoded
from autodist_fx.runtime.cache.kv_cache import SplitCache, local_cache, one_of_each_kind
from autodist_fx.runtime.device.cuda import to_device
from autodist_fx.runtime.device.decode_graphs import DecodeGraphs
from autodist_fx.runtime.execution.bound_graph import BoundGraph
from autodist_fx.runtime.execution.timed_graph import TimedGraph
from autodist_fx.runtime.failing_node import name_failing_node
from autodist_fx.runtime.generation.call_programs import CallPrograms
from autodist_fx.runtime.generation.collective_call import CallCommunicator, CollectiveCalls
from autodist_fx.runtime.generation.guarded_programs import GuardedPrograms
from autodist_fx.runtime.generation.leader import Leader
from autodist_fx.runtime.generation.step import Step
from autodist_fx.runtime.generation.step_channel import StepChannel
from autodist_fx.runtime.generation.step_messages import EncodeMessage
from autodist_fx.runtime.microbatches.bounded_sends import BoundedSends
from autodist_fx.runtime.microbatches.count import Microbatches, checked
from autodist_fx.runtime.microbatches.divided_call import joined
from autodist_fx.runtime.microbatches.in_flight import InFlight, divided_call
from autodist_fx.runtime.pretrained_members import PretrainedMembers
from autodist_fx.runtime.share_outputs import share_outputs
from autodist_fx.runtime.table_checks import lookups_checked
from cost_model.mesh import Mesh
from cost_model.partition_plan import PartitionPlan
from passes.ops.comm import using
from passes.program.rank_program import RankProgram


@dataclass(frozen=True, slots=True)
class RunnerParts:
    """The parts that a rank's model is made of, of whatever class. `program`'s parameters are loaded, on `device`.

    `positions_follow_mask`: generate counts the tokens that the mask shows, and tells the model its positions.
    `call_programs` are for calls without a cache; without them a call always fills one. `graphs`: those of steps of one
    token, where they are captured. `plan` and `load_report` (a
    LoadReport) are for whoever asks.
    """

    program: RankProgram
    communicator: CallCommunicator
    config: PretrainedConfig
    generation_config: GenerationConfig | None = None
    device: torch.device | str = "cpu"
    plan: PartitionPlan | None = None
    load_report: Any = None
    positions_follow_mask: bool = True
    call_programs: CallPrograms | None = None
    graphs: DecodeGraphs | None = None


class StepRunner(PretrainedMembers):
    """One rank's model, as a class that has transformers' generate joins it. `programs` has the program of `parts` and
    those for other sizes, where the model has guards on them. `logits_on_every_rank`, an attribute, sends what
    `model(...)` gives from the last stage to all ranks; `generate` never does.
    """

    _names: Mapping[str, str] = {}  # what the graph calls an input of the decoder, where it is not the plain name
    logits_on_every_rank = False
    in_flight = InFlight(1, "nothing was called yet")  # how the last call was divided; of generate, on the driver

    def __init__(self, parts: RunnerParts, programs: GuardedPrograms[Any]) -> None:
        super().__init__()
        self._call_programs, self._programs, self._graphs = parts.call_programs, programs, parts.graphs
        self._microbatches: Microbatches = "auto"
        program, communicator, config = parts.program, parts.communicator, parts.config
        self.program, self.communicator, self.config = program, communicator, config
        self.plan, self.load_report = parts.plan, parts.load_report
        self.positions_follow_mask = parts.positions_follow_mask
        self.generation_config = parts.generation_config or GenerationConfig.from_model_config(config)
        self.graph_module = program.graph_module.eval()
        self.device = torch.device(parts.device)
        self.dtype = next((p.dtype for p in self.graph_module.parameters() if p.is_floating_point()), torch.float32)
        mesh = program.mesh
        self.driver = mesh.rank(mesh.pp - 1, 0)
        self.is_driver = program.rank == self.driver
        others = [rank for rank in range(mesh.size) if rank != self.driver]
        self._channel = StepChannel(communicator, self.driver, others, self.device) if others else None
        self._finish_sends = getattr(communicator, "finish_sends", None) or _nothing
        plain = {of_graph: name for name, of_graph in self._names.items()}
        self._inputs = frozenset(plain.get(name, name) for name in program.input_names)
        self._leader: Leader | None = None  # on the driver, while it generates
        self.caches = CacheTable(self._announced_cache)
        self._bound: dict[GraphModule, BoundGraph] = {}  # by the graph of a program
        self.timed_graphs: dict[GraphModule, TimedGraph] | None = None  # where nodes are timed (time_nodes)
        self.calls = CollectiveCalls(communicator, mesh, program.rank, self.device)
        self._bound_graph(program.graph_module)  # lays weights out anew: a part of loading, not of the first call
        give_back_freed()  # where they lay before
        self.eval()

    def train(self, mode: bool = True) -> StepRunner:
        """As of any module, but that ranks run in eval mode. Raises AutodistError for training mode."""
        if mode:
            raise AutodistError(
                "ranks run a model in eval mode: for gradients, adx.compile(model, train=True).gradients(...)"
            )
        return super().train(False)

    @property
    def mesh(self) -> Mesh:
        """Return the mesh of all ranks."""
        return self.program.mesh

    @property
    def rank(self) -> int:
        """Return this process's global rank."""
        return self.program.rank

    def run_step(self, step: Step) -> torch.Tensor | None:
        """Run this rank's program for `step`, chosen by its guards, or by its inputs where no usual step is like it;
        return the logits where the rank has them."""
        return self.run_variant(step, self._choose(step)) if self.is_usual(step) else self._run_unusual(step)

    def is_usual(self, step: Step) -> bool:
        """Return whether the programs that generate are made for a step like this: it has tokens, mask and positions,
        no inputs beside, and what these graphs assume of values holds."""
        if step.further or (step.position_ids is None and "position_ids" in self._inputs):
            return False
        return self._call_programs is None or self._call_programs.is_usual(_tensors_of(step))

    def _run_unusual(self, step: Step) -> torch.Tensor | None:
        """Run a step by a program for just its inputs, made by all ranks together."""
        if self._call_programs is None:
            raise AutodistError(f"the ranks' graphs for generating take no {', '.join(step.further)}: generate without")
        names = self._call_programs.signature.argument_names
        given = {name: value for name, value in _tensors_of(step).items() if name in names}
        program = self._call_programs.program_for_step({**given, **step.further}, step.cache.tokens)
        return self._run_program(program, step, step.further)

    def prepare(self, lengths: Lengths) -> None:
        """Make the program for these sizes, together with all ranks. Raises AutodistError where there can be none."""
        self._programs_for(lengths).get(lengths)

    def _choose(self, step: Step) -> Any:
        """Return the variant that is to run: this is where a step's guards are evaluated, on each rank. Makes it, on
        all ranks and before any runs, where there is none. Raises AutodistError."""
        lengths = step.lengths
        return self._programs_for(lengths).get(lengths, self._announce_preparing)

    def _announce_preparing(self, lengths: Lengths) -> None:
        if self._leader is not None:
            self._leader.announce_preparing(lengths)

    def _programs_for(self, lengths: Lengths) -> GuardedPrograms[Any]:
        return self._programs

    def run_variant(self, step: Step, variant: Any) -> torch.Tensor | None:
        """Run `variant`, chosen for `step`, on this rank; return the logits where it has them."""
        return self._run_program(variant, step, {})

    def _run_program(self, program: RankProgram, step: Step, further: Mapping[str, Any]) -> torch.Tensor | None:
        """Run a program with a step's inputs; `further`: what it takes besides, by its own names."""
        if self._leader is not None and self._leader.divides_rows and program.rows.reason:
            raise AutodistError(
                f"for these sizes the graph mixes a batch's rows ({program.rows.reason}): generate with microbatches=1"
            )
        given = {
            "input_ids": step.input_ids,
            "attention_mask": step.attention_mask,
            "position_ids": step.position_ids,
            "past_key_values": step.cache,
            "cache_position": step.cache_position,
        }
        given = {self._names.get(name, name): value for name, value in given.items()} | dict(further)
        outputs = self._call(program, {name: given[name] for name in program.input_names}, step)
        step.cache.note(step.input_ids)
        return outputs.get("logits")

    def _call(self, program: RankProgram, inputs: dict[str, Any], step: Step | None = None) -> dict[str, Any]:
        """Run one of this rank's programs, on its device; return what it gives back, by name. `step`: the one that it
        is for, which may be captured."""
        if self.device.type != "cpu":
            inputs = {n: to_device(x, self.device) if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
        bound = self._bound_graph(program.graph_module)
        try:
            with using(self.communicator), lookups_checked(program.graph_module, inputs):
                outputs: dict[str, Any]
                if self._graphs is not None and step is not None and self._graphs.takes(program, step):
                    outputs = self._graphs.run(program, inputs, step.cache, lambda: bound(inputs))
                else:
                    outputs = bound(inputs)
        except Exception as error:
            if not isinstance(error, AutodistError):
                name_failing_node(error, program.graph_module, self.rank, bound.module)
            raise
        return outputs

    def time_nodes(self, on: bool) -> None:
        """Note how long each node takes from now on, in the TimedGraphs of `timed_graphs`; or do so no more."""
        self.timed_graphs = {} if on else None

    def _bound_graph(self, graph_module: GraphModule) -> BoundGraph | TimedGraph:
        """Return what runs a program's graph; made at its first run."""
        bound = self._bound.get(graph_module)
        if bound is None:
            bound = self._bound[graph_module] = BoundGraph(graph_module)
        if self.timed_graphs is None:
            return bound
        if graph_module not in self.timed_graphs:
            self.timed_graphs[graph_module] = TimedGraph(bound)
        return self.timed_graphs[graph_module]

    def _share(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the flat outputs of all ranks, on all ranks; called on all, with what each has."""
        self._finish_sends()
        return share_outputs(self.communicator, self.mesh, self.rank, outputs, self.device)

    @property
    def microbatches(self) -> Microbatches:
        """The number of microbatches that calls are divided into, on pp > 1: "auto", or 1 and more, the same on all
        ranks. A call's own `microbatches=` comes before it. Raises AutodistError when set to anything else."""
        return self._microbatches

    @microbatches.setter
    def microbatches(self, value: object) -> None:
        self._microbatches = checked(value)

    def _run_call(
        self, programs: CallPrograms, call: Call, microbatches: Microbatches | None = None
    ) -> CallOutput | tuple[Any, ...]:
        """Run a call without a cache; return what the model returns, on all ranks. Called on all."""
        call = programs.completed(call)
        made = programs.program_for(call)
        program, wanted = made.program, checked(microbatches, self._microbatches)
        parts, self.in_flight = divided_call(
            call, program.rows, made.serves, made.stage_seconds, wanted, self.mesh.pp
        )
        sends, outputs = BoundedSends(self.communicator), []
        for part in parts:
            if len(parts) > 1:
                sends.begin_action()
            outputs.append(self._call(program, {name: part.tensors[name] for name in program.input_names}))
        return returned(call, self._share(joined(outputs, program.rows)), made.output_order)

    def encoded_of(self, number: int) -> Encoded | None:
        """Return what the encoder gave under that number; None for 0, as in a model without one."""
        if number:
            raise AutodistError("there is no encoder in this model")
        return None

    def follow_encoding(self, message: EncodeMessage) -> Encoded:
        """Receive what the encoder reads, and run it."""
        raise AutodistError("there is no encoder in this model")

    def empty_cache(self) -> SplitCache:
        """Return a cache of this rank's layers, whose changes nobody is told of."""
        return local_cache(self.config, self.program, SplitCache)

    def _announced_cache(self) -> SplitCache:
        cache = self.empty_cache()
        cache.kinds_of_all = one_of_each_kind(self.config)
        if self.is_driver:
            cache.announce = self._announce_cache_change
        return cache

    def _announce_cache_change(self, what: str, cache: SplitCache, numbers: torch.Tensor) -> None:
        if self._leader is not None:
            self._leader.announce_cache_change(what, cache, numbers)


def _nothing() -> None:
    pass


def _tensors_of(step: Step) -> dict[str, torch.Tensor]:
    """Return the tensors that every step has, by forward's names; the mask of integers, as followers have it."""
    mask = None if step.attention_mask is None else step.attention_mask.long()
    usual = {"input_ids": step.input_ids, "attention_mask": mask, "position_ids": step.position_ids}
    found = {**usual, "cache_position": step.cache_position}
    return {name: value for name, value in found.items() if value is not None}
