"""Files of one saved variant: the call that it serves, its plan, its whole graph, and each rank's program.

    variants/NAME/variant.json  inputs, fixed arguments, outputs, kinds of cache layers, guards
    variants/NAME/plan.json     the plan that its programs follow
    variants/NAME/graph.json    the whole model's graph, which `verify` compares the programs with
    variants/NAME/rankR.json    the program of rank R
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from autodist_fx.artifact.manifest import ArtifactError
from autodist_fx.calls.input_spec import InputSpec
from autodist_fx.calls.made_for import MadeFor
from cost_model.errors import AutodistError
from cost_model.mesh import Mesh
from passes.fx.guards import Guards
from passes.program.param_shard import ParamShard
from passes.program.rank_program import RankProgram
from passes.program.row_division import RowDivision
from passes.serialize.modules import KINDS
from passes.serialize.read_graph import graph_from_json
from passes.serialize.write_graph import graph_to_json

LAYERS = {**KINDS, "transformers.Conv1D": (Conv1D, ("nf", "nx"))}
DECODE, ENCODE, PROMPT, STEP, WHOLE = "decode", "encode", "prompt", "step", "whole"


@dataclass(frozen=True, slots=True)
class SavedVariant:
    """A variant as variant.json has it. `input_specs` has each input's spec: its dims (size symbols and numbers) and
    its dtype."""

    name: str
    use_cache: bool
    phase: str
    inputs: tuple[str, ...]
    input_specs: Mapping[str, tuple[tuple[str | int, ...], str]]
    fixed: Mapping[str, bool | int | float | str | None]
    output_order: tuple[str, ...]
    layer_kinds: tuple[str, ...]
    encoder: str  # name of the saved variant that fills this one's cache first, or ""
    has_encoder: bool
    embedding_dim: int
    dtype: str
    image_shape: tuple[int, ...]
    sources: Mapping[str, str]  # path in graph.json -> the model's one name of that parameter or buffer
    guards: Mapping[str, Any] | None

    @property
    def folder(self) -> str:
        return f"variants/{self.name}"

    @property
    def made_for(self) -> MadeFor:
        """The calls that it is for."""
        specs = self.input_specs.items()
        made = {n: InputSpec(dims, getattr(torch, dtype, torch.long)) for n, (dims, dtype) in specs}
        return MadeFor(self.use_cache, self.fixed, made)

    def same_call(self, other: SavedVariant) -> bool:
        """True if both serve the same call, so that they differ in
        nothing but the lengths at which their guards hold."""
        own_call, other_call = ((f.made_for, f.phase, bool(f.encoder)) for f in (self, other))
        return own_call == other_call

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_KINDS = {
    "name": str, "use_cache": bool, "phase": str, "inputs": list, "input_specs": dict, "fixed": dict,
    "output_order": list, "layer_kinds": list, "encoder": str, "has_encoder": bool, "embedding_dim": int, "dtype": str,
    "image_shape": list, "sources": dict,
}  # fmt: skip


def saved_variant_from_dict(data: Mapping[str, Any], where: str) -> SavedVariant:
    """Invert SavedVariant.to_dict. Raises ArtifactError, which names the file and the field."""
    for name, kind in _KINDS.items():
        if type(data.get(name)) is not kind:
            raise ArtifactError(f"{where}: {name} is missing or of another kind: make the artifact again")
    texts = (*data["inputs"], *data["output_order"], *data["layer_kinds"], *data["sources"].values())
    plain = all(v is None or isinstance(v, (bool, int, float, str)) for v in data["fixed"].values())
    if not all(isinstance(text, str) for text in texts) or not plain:
        raise ArtifactError(f"{where}: names and fixed arguments are texts and numbers: make the artifact again")
    try:
        specs = {
            name: (tuple(d if isinstance(d, str) else int(d) for d in dims), str(dtype))
            for name, (dims, dtype) in data["input_specs"].items()
        }
        image = tuple(int(n) for n in data["image_shape"])
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{where}: the input specs are malformed: make the artifact again") from error
    fields: dict[str, Any] = {name: data[name] for name in _KINDS}
    fields |= {name: tuple(data[name]) for name in ("inputs", "output_order", "layer_kinds")}
    return SavedVariant(**{**fields, "input_specs": specs, "image_shape": image, "guards": data.get("guards")})


# -- programs ---------------------------------------------------------------------------------------------------------


def program_to_dict(program: RankProgram, keys: Mapping[str, str]) -> dict[str, Any]:
    """Serialize a program without its weights. `keys` maps a tensor's
    path in the graph to its name in the rank's weights file."""
    return {
        "rank": program.rank,
        "mesh": [program.mesh.tp, program.mesh.pp],
        "inputs": list(program.input_names),
        "cache_layers": list(program.cache_layers),
        "cache_kinds": list(program.cache_kinds),
        "length_kinds": list(program.length_kinds),
        "rows": asdict(program.rows),
        "whole_steps": program.whole_steps,
        "shards": [asdict(shard) for shard in program.param_shards.values()],
        "keys": dict(keys),
        "graph": graph_to_json(program.graph_module, LAYERS),
    }


def program_from_dict(
    data: Mapping[str, Any], rank: int, mesh: Mesh, weights: Mapping[str, torch.Tensor] | None, where: str
) -> RankProgram:
    """Rebuild a program from JSON, with parameters and buffers from `weights`, or on meta where `weights` is None.

    Raises ArtifactError, which names the file, where it is another rank's or mesh's, malformed, or has a tensor whose
    shape or dtype is not the weight's.
    """
    if data.get("rank") != rank or data.get("mesh") != [mesh.tp, mesh.pp]:
        raise ArtifactError(
            f"{where} is of rank {data.get('rank')!r} of the mesh {data.get('mesh')!r}, and should be of rank {rank} "
            f"of {mesh}: make the artifact again"
        )
    keys = data.get("keys")

    def tensor(name: str, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if weights is None:
            return torch.empty(shape, dtype=dtype, device="meta")
        key = keys.get(name) if isinstance(keys, dict) else None
        weight = weights.get(key) if isinstance(key, str) else None
        if weight is None:
            raise ArtifactError(f"{where}: {name} is not among the weights of rank {rank}: make the artifact again")
        if tuple(weight.shape) != shape or weight.dtype != dtype:
            raise ArtifactError(
                f"{where}: {name} is {list(shape)} of {dtype} in the graph, and {list(weight.shape)} of {weight.dtype} "
                f"among the weights of rank {rank}: make the artifact again"
            )
        return weight

    module = read_graph(data.get("graph"), tensor, where)
    try:
        shards = [_shard(fields) for fields in data["shards"]]
        program = RankProgram(
            rank=rank,
            mesh=mesh,
            graph_module=module,
            input_names=_texts(data["inputs"]),
            param_shards={shard.name: shard for shard in shards},
            cache_layers=tuple(_whole(n) for n in data["cache_layers"]),
            cache_kinds=_texts(data["cache_kinds"]),
            length_kinds=_texts(data["length_kinds"]),
            rows=_rows(data["rows"]),
            whole_steps=_text(data["whole_steps"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{where} is malformed ({error}): make the artifact again") from error
    placeholders = {str(node.target) for node in module.graph.nodes if node.op == "placeholder"}
    if not placeholders <= set(program.input_names) or len(program.cache_kinds) != len(program.cache_layers):
        raise ArtifactError(f"{where}: its inputs or cache layers are not those of its graph: make the artifact again")
    return program


def read_graph(
    data: Any, tensors: Callable[[str, str, tuple[int, ...], torch.dtype], torch.Tensor], where: str
) -> torch.fx.GraphModule:
    """Rebuild a GraphModule from JSON; `tensors(path, kind, shape,
    dtype)` gives its parameters and buffers. Raises ArtifactError."""
    try:
        return graph_from_json(data, tensors, LAYERS)
    except ArtifactError:
        raise
    except AutodistError as error:
        raise ArtifactError(f"{where}: {error}: make the artifact again") from error
    except (ValueError, TypeError, AttributeError, RuntimeError, KeyError, IndexError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArtifactError(f"{where} is no graph of this version ({reason}): make the artifact again") from error


def _shard(fields: Mapping[str, Any]) -> ParamShard:
    dim = fields["dim"]
    return ParamShard(
        name=_text(fields["name"]),
        source=_text(fields["source"]),
        shape=tuple(_whole(n) for n in fields["shape"]),
        dtype=_text(fields["dtype"]),
        dim=None if dim is None else _whole(dim),
        intervals=tuple((_whole(a), _whole(b)) for a, b in fields["intervals"]),
        is_buffer=bool(fields["is_buffer"]),
    )


def _rows(fields: Mapping[str, Any]) -> RowDivision:
    inputs, outputs = ({_text(n): _whole(dim) for n, dim in fields[k].items()} for k in ("inputs", "outputs"))
    return RowDivision(inputs, outputs, _text(fields["reason"]))


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError(f"{value!r} is no whole number")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _texts(values: Any) -> tuple[str, ...]:
    return tuple(_text(v) for v in values)


# -- guards -----------------------------------------------------------------------------------------------------------


def guards_to_dict(guards: Guards | None) -> dict[str, Any] | None:
    """Serialize guards: the graph that computes them, its size
    symbols, and the expected bool and source position of each."""
    if guards is None:
        return None
    return {
        "graph": graph_to_json(guards.graph_module, LAYERS),
        "symbols": list(guards.symbols),
        "expected": list(guards.expected),
        "sources": list(guards.sources),
    }


def guards_from_dict(data: Mapping[str, Any] | None, where: str) -> Guards | None:
    """Invert guards_to_dict. Raises ArtifactError, which names the file."""
    if data is None:
        return None

    def no_tensor(name: str, *_: Any) -> torch.Tensor:
        raise ArtifactError(f"{where}: a guard reads a tensor, {name}: make the artifact again")

    try:
        asked = read_graph(data["graph"], no_tensor, where)
        expected = tuple(bool(answer) for answer in data["expected"])
        guards = Guards(asked, _texts(data["symbols"]), expected, _texts(data["sources"]))
        taken = [str(node.target) for node in asked.graph.nodes if node.op == "placeholder"]
        counts = {len(guards.needs), len(expected), len(guards.sources)}
        if taken != list(guards.symbols) or len(counts) > 1:
            raise ValueError("they are not as many as their answers")
        return guards
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{where}: its guards are malformed: make the artifact again") from error
