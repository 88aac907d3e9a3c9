"""Writes a model in training as transformers writes its models: config, safetensors and their index.

Each tensor has an owner among the ranks that hold a part of it. The others send theirs, the owner puts it together and
writes it into a file of its own: a rank has beside its share as much of the model again, and none has all of it.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from autodist_fx.artifact.files import Staging
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.comm.agreement import over
from autodist_fx.runtime.comm.channels import Channel
from autodist_fx.runtime.training.rank_trainer import RankTrainer
from autodist_fx.runtime.training.replica_communicator import TrainingCommunicator
from autodist_fx.runtime.training.state_pieces import WEIGHT, state_pieces
from autodist_fx.weights.names import resolve_names
from autodist_fx.weights.sources.safetensors_source import INDEX_NAME, SINGLE_NAME
from autodist_fx.weights.sources.source import WeightSource
from autodist_fx.weights.versions import name_rules, tied_names
from passes.program.gradient_sums import Box, cells, contains

_WEIGHT_FILE = re.compile(r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_ADAPTER_FILE, _ADAPTER_PREFIX = "adapter_model.safetensors", "base_model.model."


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a tensor that a rank holds, and the number of it among the rank's pieces."""

    rank: int
    number: int
    box: Box


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor to be written: its shape and dtype, the rank that writes it, and who gives which cell of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    owner: int
    given: tuple[tuple[Box, Part], ...]


class PretrainedWriter:
    """Writes `model`, whose parameters the ranks have, to a directory; `open_weights` has what no rank holds.

    A model with an adapter of peft's is written as peft does it: the adapter alone. Raises AutodistError for several.
    """

    def __init__(self, model: PreTrainedModel, open_weights: Callable[[], WeightSource]) -> None:
        self._model, self._open_weights = model, open_weights
        self._adapter = _adapter_of(model)
        self._file_names = _names_in_files(model, self._adapter)

    def write(self, trainer: RankTrainer, communicator: TrainingCommunicator, directory: Path) -> None:
        """Write this rank's files, and on rank 0 the rest; all is in place when it returns. Called on all ranks."""
        rank, everyone = trainer.rank, over(communicator, trainer.rank, trainer.mesh.size)
        scratch = Path(everyone(str(_scratch(directory)) if rank == 0 else "")[0])
        try:
            tensors = self._own_tensors(trainer, communicator)
            if rank == 0:
                tensors |= self._left(everyone(json.dumps(sorted(tensors))))
            else:
                everyone(json.dumps(sorted(tensors)))
            nbytes = sum(x.nbytes for x in tensors.values())
            writers = [json.loads(text) for text in everyone(json.dumps([sorted(tensors), nbytes]))]
            files = self._files([names for names, _ in writers])
            if rank in files:
                Staging(scratch).write_tensors(files[rank], tensors, {"format": "pt"})
            everyone("")
            if rank == 0:
                index = {name: files[r] for r, (names, _) in enumerate(writers) for name in names}
                self._finish(scratch, directory, index, sum(n for _, n in writers))
        finally:
            if rank == 0:
                shutil.rmtree(scratch, ignore_errors=True)
        everyone("")

    def _own_tensors(self, trainer: RankTrainer, communicator: TrainingCommunicator) -> dict[str, torch.Tensor]:
        """Return the whole tensors that this rank writes, by their names in the files, when it has sent the others
        its parts of theirs."""
        rank = trainer.rank
        mine = [p for p in state_pieces(trainer) if p.key == WEIGHT and p.name in self._file_names]
        lines = json.dumps([(p.name, p.shape, str(p.tensor.dtype).removeprefix("torch."), p.box) for p in mine])
        listed = [json.loads(text) for text in over(communicator, rank, trainer.mesh.size)(lines)]
        wholes = _dealt(listed, None if self._adapter is None else 0)  # an adapter is small, and peft reads one file

        def part(cell: Box, given: Part) -> torch.Tensor:
            place = tuple(slice(a - first, b - first) for (a, b), (first, _) in zip(cell, given.box, strict=True))
            return mine[given.number].tensor[place].to("cpu")

        for whole in wholes.values():
            for cell, given in whole.given:
                if given.rank == rank != whole.owner:
                    communicator.send(part(cell, given).contiguous(), whole.owner, Channel.PARAMETERS)
        found = {}
        for name, whole in wholes.items():
            if whole.owner == rank:
                tensor = torch.empty(whole.shape, dtype=whole.dtype)
                for cell, given in whole.given:
                    sizes = [stop - start for start, stop in cell]
                    tensor[tuple(slice(*interval) for interval in cell)] = (
                        part(cell, given)
                        if given.rank == rank
                        else communicator.recv(sizes, whole.dtype, "cpu", given.rank, Channel.PARAMETERS)
                    )
                found[self._file_names[name]] = tensor
        communicator.finish_sends()
        return found

    def _left(self, told: list[str]) -> dict[str, torch.Tensor]:
        """Return what of the model no rank holds, since nothing of the loss needs it: as training found it."""
        have = {name for text in told for name in json.loads(text)}
        state = self._model.state_dict()
        wanted = [name for name in self._file_names if self._file_names[name] not in have and name in state]
        source, found = self._open_weights(), {}
        try:
            tied = tied_names(self._model)
            for name, at in resolve_names(wanted, source.names(), tied=tied, **name_rules(self._model)).items():
                found[self._file_names[name]] = source.read(at, dtype=state[name].dtype).detach().to("cpu")
        finally:
            source.close()
        return found

    def _files(self, names: list[list[str]]) -> dict[int, str]:
        """Return the file of each rank that writes one."""
        writers = [rank for rank, own in enumerate(names) if own]
        if self._adapter is not None:
            return {0: _ADAPTER_FILE}
        if len(writers) == 1:
            return {writers[0]: SINGLE_NAME}
        return {rank: f"model-{i:05d}-of-{len(writers):05d}.safetensors" for i, rank in enumerate(writers, 1)}

    def _finish(self, scratch: Path, directory: Path, index: Mapping[str, str], nbytes: int) -> None:
        """Write config and index, and put all of the files in the place of those of a model before."""
        if self._adapter is not None:
            self._adapter.config.save_pretrained(str(scratch))
        else:
            if len(set(index.values())) > 1:
                fields = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(index.items()))}
                Staging(scratch).write(INDEX_NAME, json.dumps(fields, indent=2) + "\n")
            config = copy.deepcopy(self._model.config)
            config.architectures = [type(self._model).__name__]
            config.dtype = str(self._model.dtype).removeprefix("torch.")
            config.save_pretrained(scratch)
            if self._model.can_generate() and self._model.generation_config is not None:
                self._model.generation_config.save_pretrained(scratch)
        new = {path.name for path in scratch.iterdir()}
        for path in directory.iterdir():
            if _WEIGHT_FILE.fullmatch(path.name) and path.name not in new:
                path.unlink()
        for name in sorted(new):
            os.replace(scratch / name, directory / name)


@dataclass(frozen=True, slots=True)
class _Adapter:
    """The one adapter of a model: its config, and the name in peft's file of each of its tensors."""

    config: Any
    names: Mapping[str, str]


def _adapter_of(model: PreTrainedModel) -> _Adapter | None:
    configs = getattr(model, "peft_config", None)
    if not configs:
        return None
    if len(configs) > 1:
        raise AutodistError(f"the model has several adapters ({', '.join(configs)}): it is written with one of them")
    from peft import get_peft_model_state_dict  # a model with an adapter has been made by it

    (adapter,) = configs
    state = {name: torch.empty(x.shape, dtype=x.dtype, device="meta") for name, x in model.state_dict().items()}
    by_id = {id(x): name for name, x in state.items()}
    named = get_peft_model_state_dict(model, state_dict=dict(state), adapter_name=adapter)
    if changed := next((name for name, x in named.items() if id(x) not in by_id), None):
        raise AutodistError(f"peft writes {changed} otherwise than the model has it: merge the adapter, and train that")
    return _Adapter(configs[adapter], {by_id[id(x)]: _ADAPTER_PREFIX + name for name, x in named.items()})


def _names_in_files(model: PreTrainedModel, adapter: _Adapter | None) -> dict[str, str]:
    """Return, by the first name of each tensor that is written, its name in the files."""
    if adapter is not None:
        return dict(adapter.names)
    owners = {name: group[0] for group in tied_names(model) for name in group}
    first = {id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    state, dropped = model.state_dict(keep_vars=True), set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    found = {first.get(id(x), name): owners.get(name, name) for name, x in state.items()}
    return {name: written for name, written in found.items() if written not in dropped}


def _dealt(listed: list[list[Any]], only_owner: int | None) -> dict[str, Whole]:
    """Return the tensors of all ranks, each with that of its holders as owner that writes the least yet, where not
    one owns all."""
    parts: dict[str, list[Part]] = {}
    kinds: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for rank, lines in enumerate(listed):
        for number, (name, shape, dtype, box) in enumerate(lines):
            kinds.setdefault(name, (tuple(shape), getattr(torch, dtype)))
            parts.setdefault(name, []).append(Part(rank, number, tuple((a, b) for a, b in box)))
    loads, found = [0] * len(listed), {}
    for name, own in parts.items():
        shape, dtype = kinds[name]
        owner = min({part.rank for part in own}, key=lambda rank: (loads[rank], rank))
        owner = owner if only_owner is None else only_owner
        loads[owner] += math.prod(shape) * dtype.itemsize
        given = []
        for cell in cells([part.box for part in own]):
            holding = [part for part in own if contains(part.box, cell)]
            given += [(cell, min(holding, key=lambda part: (part.rank != owner, part.rank)))] if holding else []
        found[name] = Whole(shape, dtype, owner, tuple(given))
    return found


def _scratch(directory: Path) -> Path:
    path = directory / f".{secrets.token_hex(4)}.tmp"
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise AutodistError(f"cannot save in {directory}: {error.strerror or error}") from error
    return path
