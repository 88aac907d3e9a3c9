"""`CompiledModel`, the result of `compile`: the plan, one program per rank, and methods that run and check them."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.fx
from torch import nn
from transformers import PreTrainedTokenizerBase

from autodist_fx.artifact.writer import save_compiled
from autodist_fx.compiler.compile_options import CompileOptions
from autodist_fx.compiler.source import TracingSource
from autodist_fx.errors import AutodistError
from autodist_fx.numeric.verify_numeric import verify_numeric_of
from autodist_fx.runtime.comm.join_options import DEFAULT_TIMEOUT_SECONDS, JoinOptions
from autodist_fx.runtime.comm.process_group import fail_to_join, join
from autodist_fx.runtime.microbatches.count import Microbatches, checked
from autodist_fx.simulation.simulator import Simulator
from autodist_fx.startup.build_model import RankModel
from autodist_fx.startup.facts import request_facts
from autodist_fx.startup.from_checkpoint import distribute
from passes.fx.changes import GraphChanges, graph_changes
from passes.fx.lazy_graph_module import LazyGraphModule
from passes.fx.text import graph_diff


class CompiledModel(Simulator):
    """A model split over a mesh: `plan`, `rank(r)`, `graph_diff(r)`, `simulate(**inputs)`, `verify()`.

    `simulate`, `gradients`, `save` and `to_distributed` use the model as it is at the time of the call; see `follow`.
    """

    source: TracingSource

    def verify(self, *, numeric: bool = False) -> None:
        """Prove every rank's program, as Compilation.verify does; with
        `numeric`, run `verify_numeric`, too. Raises VerificationError."""
        super().verify()
        if numeric:
            self.verify_numeric()

    def __call__(self, *args: Any, **inputs: Any) -> NoReturn:
        """Refuse to be called as a model. Raises AutodistError, which says what runs all ranks."""
        raise AutodistError(
            "a CompiledModel is the programs of all ranks: compiled.simulate(...) runs them in this process, and "
            "compiled.to_distributed()(...) over processes"
        )

    def generate(self, *args: Any, **options: Any) -> NoReturn:
        """Refuse to generate in one process. Raises AutodistError, which says what generates."""
        raise AutodistError(
            "generating is done over processes: compiled.to_distributed().generate(...) under torchrun, or "
            "adx.from_pretrained(...).generate(...); in this process run the steps by compiled.simulate(use_cache=True)"
        )

    def _repr_html_(self) -> str:
        """Return the plan as HTML, for notebooks."""
        return self.plan._repr_html_()

    def rank(self, rank: int, *, weights: bool = False) -> torch.fx.GraphModule:
        """Return the GraphModule of global rank `rank`, to be read: its parameters are on meta.

        With `weights`, return a copy to be run, which holds the rank's slices of the model's weights as they are now.
        On a mesh of one rank it runs alone (torch.compile, torch.export, fx.Interpreter), on others inside
        `passes.ops.comm.using(communicator)`. Both modules are pickled, saved by torch.save, and copied like any
        module; torch.load takes such a file with weights_only=False alone. Raises AutodistError where the model has no
        weights.
        """
        program = self.program(rank)
        LazyGraphModule.force_recompile(program.graph_module)
        if not weights:
            return program.graph_module
        self.source.check_weights("rank(weights=True)")
        empty = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in program.graph_module.parameters()}
        own = replace(program, graph_module=copy.deepcopy(program.graph_module, dict(empty)))
        self.source.fill(self.main, [own])
        for parameter in own.graph_module.parameters():
            parameter.data = parameter.data.clone()  # `fill` may lend the model's own memory
        return own.graph_module

    def graph_diff(self, rank: int) -> str:
        """Return the unified diff from the traced, normalised graph to the graph of global rank `rank`."""
        return graph_diff(self.graph, self.rank(rank))

    def graph_changes(self, rank: int) -> GraphChanges:
        """Count the nodes that `rank`'s graph inserts, replaces, removes or changes, by kind."""
        return graph_changes(self.graph, self.rank(rank))

    def verify_numeric(self) -> None:
        """Run all ranks in this process, in float64 on drawn weights, and compare with the model's own traced graph,
        which shares nothing with plans and rules (autodist_fx/numeric). With `train`, gradients are compared, too, of
        models of up to 2**24 parameters. It needs no weights, and little memory for a model of any size.

        Raises VerificationError, which names the rank, the output, and for a small model the first node that differs;
        AutodistError where the model itself does not run on made-up inputs.
        """
        verify_numeric_of(self)

    def to_distributed(
        self,
        *,
        device: str | torch.device | None = None,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        microbatches: Microbatches = "auto",
        cuda_graphs: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        master_addr: str | None = None,
        master_port: int | None = None,
    ) -> RankModel:
        """Start this process as its rank of the mesh, from the
        model that every process has in memory; see from_pretrained.

        The model is planned anew for generating (with a KV cache), from the options that `compile` got. Every process
        calls it alike, under torchrun or with `rank`, ... given. The model itself may be freed afterwards. Raises
        AutodistError, in one line, on every rank.
        """
        options = JoinOptions(device, rank, world_size, master_addr, master_port, timeout, cuda_graphs)
        request = replace(self.source.request, sizes=())
        try:
            in_flight = checked(microbatches)
            self.source.check_weights("to_distributed")
        except AutodistError as error:
            fail_to_join(error, options)
        facts = request_facts("to_distributed", request, None, verify=self.verifies)
        joined = join(self.mesh, options, facts)
        compiling = CompileOptions(verify=self.verifies, dump_dir=self.options.dump_dir)
        model = distribute(self.source.shape, joined, request, compiling)
        model.microbatches = in_flight
        return model

    def save(self, directory: str | Path, *, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Write plan, graphs and weights of all ranks as an artifact (docs/artifact.md), for `adx.load(directory)`.

        It holds the variants that were used so far, and those that generating takes. `tokenizer` is saved along, for
        `autodist-fx run --artifact`. An artifact that is there already is replaced. Raises ArtifactError; AutodistError
        where the model has no weights; GraphFormatError where a graph has an op that no file can hold.
        """
        self.source.check_weights("save")
        self.follow()
        model = self.source.shape
        save_compiled(
            self,
            model,
            directory,
            lambda variant, program: self.source.fill(variant, [program]),
            generation_config=getattr(model, "generation_config", None),
            tokenizer=tokenizer,
        )
