"""`share_outputs`: what each pipeline stage gives of a call's outputs goes to all ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from autodist_fx.errors import CommunicationError
from autodist_fx.runtime.comm.channels import Channel
from cost_model.mesh import Mesh
from passes.ops.comm import Communicator

_MOST_BYTES = 2**24  # of a list of outputs


def share_outputs(
    communicator: Communicator, mesh: Mesh, rank: int, outputs: Mapping[str, Any], device: torch.device
) -> dict[str, Any]:
    """Return the flat outputs of all stages, on all ranks; called on all, each with its own: tensors, on `device`, or
    what JSON has. Of an output that several stages give, the first one's.

    The ranks of one tp group, and replicas, have the same, so each sends to its namesakes alone, and all links carry as
    much. Raises CommunicationError where what arrives is no list of outputs.
    """
    (stage, tp_rank), dp_rank = mesh.coordinates(rank), mesh.dp_rank(rank)
    found: dict[str, Any] = {}
    for source in range(mesh.pp):
        if source == stage:
            mine = {name: value for name, value in outputs.items() if name not in found}
            for other in range(mesh.pp):
                if other != stage:
                    _send(communicator, mine, mesh.rank(other, tp_rank, dp_rank))
            found.update(mine)
        else:
            found.update(_receive(communicator, mesh.rank(source, tp_rank, dp_rank), device))
    return found


def _send(communicator: Communicator, outputs: Mapping[str, Any], to: int) -> None:
    lines = [
        [name, str(x.dtype).removeprefix("torch."), list(x.shape)] if isinstance(x, torch.Tensor) else [name, "", x]
        for name, x in outputs.items()
    ]
    text = torch.frombuffer(bytearray(json.dumps(lines).encode()), dtype=torch.uint8)
    communicator.send(torch.tensor([text.numel()]), to, Channel.OUTPUTS)
    communicator.send(text, to, Channel.OUTPUTS)
    for value in outputs.values():
        if isinstance(value, torch.Tensor):
            communicator.send(value, to, Channel.OUTPUTS)


def _receive(communicator: Communicator, source: int, device: torch.device) -> dict[str, Any]:
    (length,) = communicator.recv((1,), torch.long, "cpu", source, Channel.OUTPUTS).tolist()
    if not 0 < length <= _MOST_BYTES:
        raise CommunicationError(f"rank {source} announces a list of outputs of {length} bytes")
    text = communicator.recv((length,), torch.uint8, "cpu", source, Channel.OUTPUTS)
    found: dict[str, Any] = {}
    for name, dtype_name, value in json.loads(text.numpy().tobytes()):
        if not dtype_name:
            found[name] = value
            continue
        dtype = getattr(torch, dtype_name, None)
        if not isinstance(dtype, torch.dtype):
            raise CommunicationError(f"rank {source} announces output {name} of dtype {dtype_name!r}")
        found[name] = communicator.recv(value, dtype, device, source, Channel.OUTPUTS)
    return found
