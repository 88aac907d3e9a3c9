"""Shares weights between two programs of one rank: a slice that both hold is one tensor."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import replace

from torch import nn

from passes.ops.buffers import written_buffers
from passes.program.rank_program import RankProgram


def share_weights(loaded: RankProgram, program: RankProgram) -> RankProgram:
    """Put the tensors of `loaded` into `program` wherever both hold the same slice of the same weight.

    Returns `program` with only the shards that are left to be loaded; there are none where the two layouts coincide.
    """
    have = {shard.slice_key: name for name, shard in loaded.param_shards.items()}
    left = {}
    for name, shard in program.param_shards.items():
        if shard.slice_key in have:
            _put(program.graph_module, name, _tensor(loaded.graph_module, have[shard.slice_key]))
        else:
            left[name] = shard
    return replace(program, param_shards=left)


def share_state(program: RankProgram, state: MutableMapping[tuple[int, str], object]) -> None:
    """Let the buffers that `program` writes be those in `state`,
    by (tp rank, name in the model), and add missing ones to it.

    A call thus goes on from the values that the call before left, whichever graph that one ran.
    """
    for name in written_buffers(program.graph_module):
        key = program.tp_rank, program.param_shards[name].source
        _put(program.graph_module, name, state.setdefault(key, _tensor(program.graph_module, name)))


def _tensor(module: nn.Module, name: str) -> object:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    return owner._parameters[leaf] if leaf in owner._parameters else owner._buffers[leaf]


def _put(module: nn.Module, name: str, tensor: object) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    # Through the dicts: setattr would refuse a parameter of another class, and register a buffer as a persistent one.
    (owner._parameters if leaf in owner._parameters else owner._buffers)[leaf] = tensor
