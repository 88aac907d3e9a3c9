"""`SavedSource`: serves the variants of an artifact to a Simulator, which runs all ranks in one process."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from autodist_fx.artifact.files import CheckedFiles
from autodist_fx.artifact.manifest import ArtifactError
from autodist_fx.artifact.reader import SAVE_SUCH, ArtifactReader
from autodist_fx.artifact.variant_format import SavedVariant, read_graph
from autodist_fx.calls.call import Call
from autodist_fx.calls.lengths import Lengths
from autodist_fx.calls.model_signature import ModelSignature
from autodist_fx.compiler.compile_options import CompileOptions
from autodist_fx.compiler.variant import Variant
from autodist_fx.compiler.variant_set import VariantSet
from autodist_fx.errors import AutodistError
from autodist_fx.simulation.simulator import Simulator
from autodist_fx.tracing import InputSpec, TracedModel
from autodist_fx.tracing.example_inputs import ExampleInputs
from cost_model.graph.op_graph import OpGraph
from passes.fx import node_meta
from passes.op_graph.build import build_op_graph, fingerprint
from passes.program.rank_program import RankProgram


@dataclass(frozen=True)
class SavedSource:
    """A VariantSource that has the saved variants of an artifact with their weights, and refuses to make others."""

    signature: ModelSignature
    saved: VariantSet
    has_own_cache: bool
    positions_of_values: bool
    always: Mapping[str, object]

    def structure(self) -> Hashable:
        """See VariantSource. It never changes, since files do not."""
        return self.saved.structure

    def first(self) -> VariantSet:
        """See VariantSource."""
        return self.saved

    def phases(self) -> tuple[Variant, Variant]:
        """See VariantSource."""
        raise AutodistError("this artifact has no variant with the model's own cache: compile it with use_cache=True")

    def for_inputs(
        self, *, use_cache: bool, input_names: Sequence[str] | None, fixed: Mapping[str, object] | None
    ) -> Variant:
        """See VariantSource."""
        self._refuse([*(input_names or ()), *_fixed_texts(fixed or {})], use_cache, self.saved.all)

    def completed(self, call: Call) -> Call:
        """See VariantSource. Python that counts positions is in no file: such a call is to have them."""
        left_out = call.use_cache and "position_ids" not in call.tensors
        return call.counted_by_model() if left_out and self.positions_of_values else call

    def for_call(self, call: Call, specs: Mapping[str, InputSpec], past: int, made: Sequence[Variant]) -> Variant:
        """See VariantSource."""
        self._refuse([*specs, *_fixed_texts(call.fixed)], call.use_cache, made, call.way_out)

    def at_lengths(self, alike: Sequence[Variant], lengths: Lengths) -> Variant:
        """See VariantSource."""
        raise AutodistError(alike[0].guards_text(lengths) + SAVE_SUCH)

    def check_weights(self, purpose: str) -> None:
        """See VariantSource."""
        if purpose != "simulate":
            raise AutodistError(f"{purpose} needs the model: an artifact holds its split alone; use Artifact.{purpose}")

    def fill(self, variant: Variant, programs: Sequence[RankProgram]) -> None:
        """See VariantSource. It does nothing: the programs were read with their weights."""

    def trained_parameters(self) -> Mapping[str, str]:
        """See VariantSource. An artifact trains none."""
        return {}

    def hooked(self, gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See VariantSource. An artifact has no hooks."""
        return gradients

    def _refuse(
        self, asked: Sequence[str], use_cache: bool, made: Sequence[Variant], way_out: str = ""
    ) -> NoReturn:
        have = ["; ".join([*v.specs, *_fixed_texts(v.fixed)]) for v in made]
        raise AutodistError(
            f"this artifact has no variant for a call with {', '.join([*asked, *(['a cache'] if use_cache else [])])}; "
            f"it has ({'), ('.join(have)}): save one by calling simulate like this before save{way_out}"
        )


def _fixed_texts(fixed: Mapping[str, object]) -> list[str]:
    return [f"{name}={value!r}" for name, value in fixed.items()]


def load_whole(artifact: ArtifactReader, files: CheckedFiles) -> Simulator:
    """Read all ranks of an artifact into one process, as a Simulator. Every file is read. Raises ArtifactError."""
    fields = artifact.model_fields
    variants: dict[str, Variant] = {}
    for saved in sorted(artifact.variants.values(), key=lambda f: bool(f.encoder)):
        variants[saved.name] = _variant(artifact, files, saved, variants)
    main = variants[fields["main"]]
    main.whole_plan = artifact.plan
    source = SavedSource(
        signature=artifact.signature,
        saved=_set_of(main, [v for name, v in variants.items() if name not in _encoders(artifact)]),
        has_own_cache=fields["own_cache"],
        positions_of_values=fields["positions_of_values"],
        always=fields.get("always") or {},
    )
    return Simulator(source, CompileOptions())


def _encoders(artifact: ArtifactReader) -> set[str]:
    """Return the names of saved variants that are the encoder of another one."""
    return {saved.encoder for saved in artifact.variants.values()}


def _set_of(main: Variant, variants: Sequence[Variant]) -> VariantSet:
    prompts = [v for v in variants if v.traced.phase == "prompt"]
    steps = [v for v in variants if v.traced.phase == "step"]
    return VariantSet((), main, prompts, steps, [v for v in variants if not v.traced.phase and v is not main])


def _variant(
    artifact: ArtifactReader, files: CheckedFiles, saved: SavedVariant, before: Mapping[str, Variant]
) -> Variant:
    """Rebuild one saved variant: its whole graph, plan, op graph,
    guards, and the programs of all ranks. Raises ArtifactError."""
    folder = artifact.directory / saved.folder
    values, _ = (
        files.read_tensors(f"{saved.folder}/graph.safetensors")
        if files.has(f"{saved.folder}/graph.safetensors")
        else ({}, {})
    )

    def tensor(name: str, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        saved = values.get(name)
        if saved is None:
            return torch.empty(shape, dtype=dtype, device="meta")
        if tuple(saved.shape) != shape or saved.dtype != dtype:
            raise ArtifactError(f"{folder / 'graph.safetensors'}: {name} is not as the graph has it")
        return saved

    graph = read_graph(files.read_json(f"{saved.folder}/graph.json"), tensor, str(folder / "graph.json"))
    node_meta.set_guards(graph, artifact.guards_of(saved))
    dtype = _dtype(saved.dtype, folder)
    examples = ExampleInputs(
        input_names=saved.inputs,
        config=artifact.config,
        cache_layers=(),
        embedding_dim=saved.embedding_dim,
        dtype=dtype,
        image_shape=saved.image_shape,
        has_encoder=saved.has_encoder,
    )
    traced = TracedModel(
        graph_module=graph,
        input_names=saved.inputs,
        use_cache=saved.use_cache,
        config=artifact.config,
        model_class=artifact.model_fields["class"],
        layer_kinds=saved.layer_kinds,
        _examples=examples,
        phase=saved.phase,
    )
    named = dict((*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)))
    if not named.keys() <= saved.sources.keys():
        where = folder / "variant.json"
        raise ArtifactError(f"{where} does not name all tensors of the graph: make the artifact again")
    sources = {id(t): saved.sources[path] for path, t in named.items()}
    plan, op_graph = artifact.read_plan(f"{saved.folder}/plan.json"), _op_graph(graph, sources, folder)
    if fingerprint(op_graph) != plan.fingerprint:
        raise ArtifactError(f"{folder / 'graph.json'} is not the graph that the plan beside it is for")
    return Variant(
        traced=traced,
        graph=op_graph,
        plan=plan,
        sources=sources,
        fixed=dict(saved.fixed),
        specs=dict(saved.made_for.specs),
        output_order=saved.output_order,
        programs={rank: artifact.program(rank, saved.name) for rank in range(artifact.mesh.size)},
        encoder=before.get(saved.encoder) if saved.encoder else None,
    )


def _op_graph(graph: torch.fx.GraphModule, sources: dict[int, str], folder: Any) -> OpGraph:
    try:
        return build_op_graph(graph, sources)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        raise ArtifactError(f"{folder / 'graph.json'} is no normalised graph: make the artifact again") from error


def _dtype(name: str, folder: Any) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ArtifactError(f"{folder / 'variant.json'}: {name!r} is no dtype: make the artifact again")
    return found
