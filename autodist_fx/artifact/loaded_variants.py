"""All ranks of an artifact in one process: a Simulator whose variants come from files."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig

from autodist_fx.artifact.files import CheckedFiles
from autodist_fx.artifact.manifest import ArtifactError
from autodist_fx.artifact.reader import SAVE_SUCH, ArtifactReader
from autodist_fx.artifact.variant_format import Form, read_graph
from autodist_fx.calls.call import Call
from autodist_fx.calls.lengths import Lengths
from autodist_fx.compiler.compile_options import CompileOptions
from autodist_fx.compiler.variant import Variant
from autodist_fx.errors import AutodistError
from autodist_fx.simulation.simulator import Simulator
from autodist_fx.tracing import InputForm, TracedModel
from autodist_fx.tracing.example_inputs import ExampleInputs
from cost_model.costs import hardware
from cost_model.graph.op_graph import OpGraph
from cost_model.request.plan_request import PlanRequest
from passes.fx import node_meta
from passes.op_graph.build import build_op_graph, fingerprint

_KINDS = {kind.name: kind for kind in inspect._ParameterKind}


class LoadedModel(Simulator):
    """As Simulator, but that a call which none of the saved forms is for is refused."""

    own_cache = False

    @property
    def has_own_cache(self) -> bool:
        return self.own_cache

    def _refuse_without_weights(self, what: str) -> None:
        if what != "simulate":
            raise AutodistError(f"{what} needs the model: an artifact holds its split alone; use Artifact.{what}")

    def _new_variant_for(self, call: Call, forms: Mapping[str, InputForm]) -> Variant:
        asked = [*forms, *(f"{k}={v!r}" for k, v in call.fixed.items()), *(["a cache"] if call.use_cache else [])]
        have = ["; ".join([*v.forms, *(f"{k}={x!r}" for k, x in v.fixed.items())]) for v in self._variants]
        raise AutodistError(
            f"this artifact has no form for a call with {', '.join(asked)}; it has ({'), ('.join(have)}): save one by "
            "calling simulate like this before save"
        )

    def _at_lengths(self, alike: Sequence[Variant], lengths: Lengths, made: list[Variant]) -> Variant:
        found = next((variant for variant in alike if variant.fits(lengths)), None)
        if found is None:
            raise AutodistError(alike[0].other_way(lengths) + SAVE_SUCH)
        return found

    def new_phases(self) -> tuple[Variant, Variant]:
        raise AutodistError("this artifact has no form with the model's own cache: compile it with use_cache=True")


def load_whole(artifact: ArtifactReader, files: CheckedFiles) -> LoadedModel:
    """Reads every file. Raises ArtifactError."""
    fields = artifact.model_fields
    variants: dict[str, Variant] = {}
    for form in sorted(artifact.forms.values(), key=lambda f: bool(f.encoder)):
        variants[form.name] = _variant(artifact, files, form, variants)
    main = variants[fields["main"]]
    main.whole_plan = artifact.plan
    encoders = {form.encoder for form in artifact.forms.values()}
    prompt = next((variants[f.name] for f in artifact.forms.values() if f.phase == "prompt"), None)
    named = type(artifact.manifest.model, (_Model,), {})  # messages name a model's class
    model: Any = named(fields, artifact.config, artifact.directory / "model.json")
    loaded = LoadedModel(
        model,
        PlanRequest(mesh=artifact.mesh, hardware=hardware.hardware("generic")),
        main,
        CompileOptions.from_keywords(concrete_args=fields.get("always")),
        prompt=prompt,
    )
    loaded.own_cache = fields["own_cache"]
    phased = [variants[f.name] for f in artifact.forms.values() if f.phase == "prompt"]
    loaded._more_prompts = phased[1:]
    others = {name: v for name, v in variants.items() if artifact.forms[name].phase != "prompt"}
    loaded._variants = [v for name, v in others.items() if name not in encoders]
    return loaded


def _variant(artifact: ArtifactReader, files: CheckedFiles, form: Form, before: Mapping[str, Variant]) -> Variant:
    folder = artifact.directory / form.folder
    values, _ = (
        files.read_tensors(f"{form.folder}/graph.safetensors")
        if files.has(f"{form.folder}/graph.safetensors")
        else ({}, {})
    )

    def tensor(name: str, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        found = values.get(name)
        if found is None:
            return torch.empty(shape, dtype=dtype, device="meta")
        if tuple(found.shape) != shape or found.dtype != dtype:
            raise ArtifactError(f"{folder / 'graph.safetensors'}: {name} is not as the graph has it")
        return found

    graph = read_graph(files.read_json(f"{form.folder}/graph.json"), tensor, str(folder / "graph.json"))
    node_meta.set_guards(graph, artifact.conditions_of(form))
    dtype = _dtype(form.dtype, folder)
    examples = ExampleInputs(
        input_names=form.inputs,
        config=artifact.config,
        cache_layers=(),
        embedding_dim=form.embedding_dim,
        dtype=dtype,
        image_shape=form.image_shape,
        has_encoder=form.has_encoder,
    )
    traced = TracedModel(
        graph_module=graph,
        input_names=form.inputs,
        use_cache=form.use_cache,
        config=artifact.config,
        model_class=artifact.model_fields["class"],
        layer_kinds=form.layer_kinds,
        _examples=examples,
        phase=form.phase,
    )
    named = dict((*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)))
    if not named.keys() <= form.sources.keys():
        raise ArtifactError(f"{folder / 'form.json'} does not name all tensors of the graph: make the artifact again")
    sources = {id(t): form.sources[path] for path, t in named.items()}
    plan, op_graph = artifact.read_plan(f"{form.folder}/plan.json"), _op_graph(graph, sources, folder)
    if fingerprint(op_graph) != plan.fingerprint:
        raise ArtifactError(f"{folder / 'graph.json'} is not the graph that the plan beside it is for")
    return Variant(
        traced=traced,
        graph=op_graph,
        plan=plan,
        sources=sources,
        fixed=dict(form.fixed),
        forms={name: InputForm(dims, _dtype(kind, folder)) for name, (dims, kind) in form.input_forms.items()},
        output_order=form.output_order,
        programs={rank: artifact.program(rank, form.name) for rank in range(artifact.mesh.size)},
        loaded=True,
        encoder=before.get(form.encoder) if form.encoder else None,
    )


def _op_graph(graph: torch.fx.GraphModule, sources: dict[int, str], folder: Any) -> OpGraph:
    try:
        return build_op_graph(graph, sources)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        raise ArtifactError(f"{folder / 'graph.json'} is no normalised graph: make the artifact again") from error


def _dtype(name: str, folder: Any) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ArtifactError(f"{folder / 'form.json'}: {name!r} is no dtype: make the artifact again")
    return found


class _Model:
    """What a call asks of a model that is not there: its config, and the arguments of its forward."""

    base_model_prefix = ""

    def __init__(self, fields: Mapping[str, Any], config: PretrainedConfig, where: Any) -> None:
        self.config = config
        try:
            parameters = [
                inspect.Parameter(name, _KINDS[kind], default=default if optional else inspect.Parameter.empty)
                for name, kind, optional, default in fields["forward"]
            ]
            self.forward = _nothing_but(inspect.Signature(parameters))
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{where} has no arguments of forward: make the artifact again") from error

def _nothing_but(signature: inspect.Signature) -> Callable[..., None]:
    def forward(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an artifact has no model to call")

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward
