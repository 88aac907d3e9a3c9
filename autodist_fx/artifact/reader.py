"""Reads an artifact: one rank of it or all, without tracing, planning, or the model's own code."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from autodist_fx.artifact.files import CheckedFiles
from autodist_fx.artifact.manifest import (
    ArtifactError,
    check_listing,
    json_object,
    library_versions,
    read_manifest,
)
from autodist_fx.artifact.variant_format import (
    SavedVariant,
    guards_from_dict,
    program_from_dict,
    read_graph,
    saved_variant_from_dict,
)
from autodist_fx.calls.call import FILLED_IN, Call
from autodist_fx.calls.input_specs import ModelFacts, specs_of
from autodist_fx.calls.model_signature import ModelSignature
from autodist_fx.errors import AutodistError
from cost_model.errors import PlanError
from cost_model.graph.op_graph import OpGraph
from cost_model.mesh import Mesh
from cost_model.partition_plan import PartitionPlan
from cost_model.plan.read_json import plan_from_text
from passes.fx.guards import Guards
from passes.op_graph.build import build_op_graph
from passes.program.rank_program import RankProgram

TOKENIZER = "tokenizer"
_KINDS = {kind.name: kind for kind in inspect._ParameterKind}
SAVE_SUCH = ", and the artifact has no variant for that: save one by calling simulate with such lengths before save"
MAKE_AGAIN = ": make the artifact again"


class ArtifactReader:
    """The files of an artifact: `plan`, `mesh`, `config`, `variants`, `program(r)`.

    Each file is read when it is first needed, and checked against its digest then. Reading raises ArtifactError.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(os.path.abspath(Path(directory).expanduser()))
        self.manifest = read_manifest(self.directory)
        check_listing(self.directory, self.manifest)
        self._files = CheckedFiles(self.directory, self.manifest)
        self._weights: dict[tuple[int, torch.device], dict[str, torch.Tensor]] = {}
        _warn_of_versions(self.directory, self.manifest.versions)

    @property
    def mesh(self) -> Mesh:
        return Mesh(self.manifest.tp, self.manifest.pp)

    @cached_property
    def plan(self) -> PartitionPlan:
        """Every decision made; print it, compare it."""
        return self.read_plan("plan.json")

    def read_plan(self, name: str) -> PartitionPlan:
        """Read one plan file. Raises ArtifactError, also where its mesh is not the manifest's."""
        path = self.directory / name
        try:
            plan = plan_from_text(self._files.read(name).decode(), PartitionPlan)
        except (PlanError, UnicodeDecodeError) as error:
            raise ArtifactError(f"{path}: {error}{MAKE_AGAIN}") from error
        if plan.mesh != self.mesh:
            raise ArtifactError(f"{path} is for {plan.mesh}, and the manifest says {self.mesh}{MAKE_AGAIN}")
        return plan

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's config."""
        return self._configuration("config.json", lambda fields: _config_of(fields, self.directory))

    @cached_property
    def generation_config(self) -> GenerationConfig | None:
        """The model's generation config; None where none was saved."""
        if not self._files.has("generation_config.json"):
            return None
        # from_pretrained, not from_dict: it also sets private attributes that transformers' generate reads
        return self._configuration(
            "generation_config.json", lambda fields: GenerationConfig.from_pretrained(str(self.directory))
        )

    def _configuration(self, name: str, read: Any) -> Any:
        path = self.directory / name
        fields = json_object(self._files.read(name), str(path), strict=False)  # transformers writes Infinity
        try:
            return read(fields)
        except (KeyError, ValueError, TypeError, AttributeError, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ArtifactError(f"{path} cannot be read ({reason}){MAKE_AGAIN}") from error

    @cached_property
    def model_fields(self) -> dict[str, Any]:
        """Facts about the model's class, from model.json: its name, forward's parameters, the main variant."""
        fields = self._files.read_json("model.json")
        texts = ("class", "main_input_name", "main")
        flags = ("is_asked", "own_cache", "positions_follow_mask", "positions_of_values")
        right = all(isinstance(fields.get(text), str) for text in texts)
        if not right or not all(type(fields.get(flag)) is bool for flag in flags):
            raise ArtifactError(f"{self.directory / 'model.json'} is malformed{MAKE_AGAIN}")
        if fields["main"] not in self.manifest.variants:
            raise ArtifactError(f"{self.directory / 'model.json'} names a variant that is not there{MAKE_AGAIN}")
        return fields

    @cached_property
    def variants(self) -> dict[str, SavedVariant]:
        """The saved variants (variant.json of each), by name."""
        found = {}
        for name in self.manifest.variants:
            where = f"variants/{name}/variant.json"
            saved = saved_variant_from_dict(self._files.read_json(where), str(self.directory / where))
            if saved.name != name or (saved.encoder and saved.encoder not in self.manifest.variants):
                raise ArtifactError(f"{self.directory / where} is of another variant{MAKE_AGAIN}")
            found[name] = saved
        return found

    @cached_property
    def signature(self) -> ModelSignature:
        """The model as a call sees it."""
        try:
            parameters = [
                inspect.Parameter(name, _KINDS[kind], default=default if optional else inspect.Parameter.empty)
                for name, kind, optional, default in self.model_fields["forward"]
            ]
            in_order = inspect.Signature(parameters).parameters  # which refuses an order that none can have
        except (KeyError, TypeError, ValueError) as error:
            where = self.directory / "model.json"
            raise ArtifactError(f"{where} has no arguments of forward{MAKE_AGAIN}") from error
        return ModelSignature(self.manifest.model, tuple(in_order.values()), self.config)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer that was saved along. Raises ArtifactError where there is none."""
        names = [name for name in self.manifest.files if name.startswith(f"{TOKENIZER}/")]
        if not names:
            raise ArtifactError(f"{self.directory} has no tokenizer: save it with tokenizer=..., or encode by hand")
        for name in names:
            self._files.check(name)
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(self.directory / TOKENIZER), trust_remote_code=False)
        except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ArtifactError(f"the tokenizer in {self.directory / TOKENIZER} cannot be read: {reason}") from error
        return tokenizer

    # -- programs -----------------------------------------------------------------------------------------------------

    def program(self, rank: int, variant: str | None = None, device: torch.device | str = "cpu") -> RankProgram:
        """Read the program of global rank `rank` with its weights on
        `device`; that of the main variant where `variant` names none.

        Raises AutodistError for a variant that the artifact does not hold, MeshError for a rank that the mesh does not
        have.
        """
        self.mesh.coordinates(rank)  # raises for a rank that the mesh does not have
        name = variant or self.model_fields["main"]
        if name not in self.variants:
            raise AutodistError(f"{self.directory} has no variant {name!r}: it has {', '.join(self.variants)}")
        return self.read_program(rank, self.variants[name], self.weights_of(rank, torch.device(device)))

    def read_program(self, rank: int, saved: SavedVariant, weights: Mapping[str, torch.Tensor] | None) -> RankProgram:
        """Read the program of one rank for one saved variant; its parameters are on meta where `weights` is None."""
        name = f"{saved.folder}/rank{rank}.json"
        return program_from_dict(self._files.read_json(name), rank, self.mesh, weights, str(self.directory / name))

    def op_graph(self, saved: SavedVariant) -> OpGraph:
        """Read the whole graph of a saved variant as its plan's ops; without weights."""
        name = f"{saved.folder}/graph.json"

        def empty(_: str, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        graph = read_graph(self._files.read_json(name), empty, str(self.directory / name))
        named = dict((*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)))
        return build_op_graph(graph, {id(t): saved.sources.get(path, path) for path, t in named.items()})

    def rank(self, rank: int) -> torch.fx.GraphModule:
        """Return the GraphModule of global rank `rank`, with its weights."""
        return self.program(rank).graph_module

    def weights_of(self, rank: int, device: torch.device) -> dict[str, torch.Tensor]:
        """Return the tensors of one rank by name, on `device`; they are read once and shared by all of its programs."""
        if (rank, device) not in self._weights:
            name = f"weights/rank{rank}.safetensors"
            tensors, metadata = self._files.read_tensors(name, device)
            if metadata.get("rank") != str(rank):
                raise ArtifactError(
                    f"{self.directory / name} holds the weights of rank {metadata.get('rank')!r}, and should hold "
                    f"those of rank {rank}{MAKE_AGAIN}"
                )
            self._weights[rank, device] = tensors
        return self._weights[rank, device]

    def guards_of(self, saved: SavedVariant) -> Guards | None:
        """Return the guards of a saved variant; None where it has none."""
        return guards_from_dict(saved.guards, str(self.directory / saved.folder / "variant.json"))

    def usual_variant(self) -> SavedVariant:
        """Return the saved variant of a decode step; where there is none, that of a call without a cache. Raises
        AutodistError where all have one and none is a step."""
        encoders = {saved.encoder for saved in self.variants.values()}
        told = {"position_ids"} if self.model_fields["positions_of_values"] else set()
        for saved in self.variants.values():
            if saved.use_cache and saved.phase != "prompt" and saved.name not in encoders and _is_usual(saved, told):
                return saved
        if (called := next((saved for saved in self.variants.values() if not saved.use_cache), None)) is not None:
            return called
        raise AutodistError(
            f"{self.directory} holds {self.manifest.model} in no variant that processes run: use "
            "adx.load(directory).simulate(...) in one process"
        )

    def variants_for(self, call: Call, past: int) -> list[SavedVariant]:
        """The variants that were saved for this call, with `past` tokens in its cache: one, or several, for lengths of
        their own.

        Raises AutodistError where there is none, or where an input has a shape or dtype that the model does not take.
        """
        step = self.usual_variant()
        facts = ModelFacts(self.config, step.has_encoder, step.embedding_dim, getattr(torch, step.dtype))
        asked = specs_of(call.tensors, facts, past)
        found = [saved for saved in self.variants.values() if saved.made_for.takes(call, asked)]
        if found:
            return found
        texts = [*asked, *(f"{name}={value!r}" for name, value in call.fixed.items())]
        raise AutodistError(
            f"{self.directory} has no variant for a call with {', '.join(texts)} (it has {self.described_variants()}): "
            f"save one by calling simulate with these first, or use from_pretrained{call.way_out}"
        )

    def described_variants(self) -> str:
        """List the saved variants and their inputs, for errors."""
        return "; ".join(f"{saved.name}: {', '.join(saved.inputs)}" for saved in self.variants.values())


def _is_usual(saved: SavedVariant, told: set[str]) -> bool:
    """Return whether this is a step of tokens alone: without images and the like, and with one position a token; it
    takes what it is `told`."""
    if saved.has_encoder or saved.phase:
        return True
    several = "position_ids" in saved.input_specs and len(saved.input_specs["position_ids"][0]) > 2
    return told <= set(saved.input_specs) <= FILLED_IN and not several


def _config_of(fields: dict[str, Any], directory: Path) -> PretrainedConfig:
    kind = fields.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"transformers knows no model type {kind!r}")
    # from_pretrained, not from_dict: it knows how transformers writes an infinity
    return CONFIG_MAPPING[kind].from_pretrained(str(directory))


def _warn_of_versions(directory: Path, made_with: Mapping[str, str]) -> None:
    here = library_versions()
    other = [f"{name} {v} (here {here[name]})" for name, v in made_with.items() if name in here and here[name] != v]
    if other:
        made = f"{directory} was made with {', '.join(other)}"
        warnings.warn(f"{made}: compare its output, or make it again", stacklevel=3)


__all__ = ["ArtifactReader"]
