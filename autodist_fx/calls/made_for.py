"""`MadeFor`: the calls that a graph was made for. `simulate`, ranks and artifacts all find a call's graph by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from autodist_fx.calls.call import Call
from autodist_fx.calls.constant_tensor import ConstantTensor
from autodist_fx.calls.input_spec import InputSpec


@dataclass(frozen=True, slots=True)
class MadeFor:
    """Calls with or without a cache, with inputs of these `specs`, and these values of the `fixed` arguments, among
    which are ConstantTensors of inputs whose values the graph holds."""

    use_cache: bool
    fixed: Mapping[str, object]
    specs: Mapping[str, InputSpec]

    def takes(self, call: Call, specs: Mapping[str, InputSpec]) -> bool:
        """Return whether the graph was made for a call whose tensors have these specs: with a cache, tokens, masks and
        positions that the call leaves out are filled in, where `call.filled_in` has them; without one nothing is."""
        if self.use_cache != call.use_cache:
            return False
        constants = self.fixed.keys() & call.tensors.keys()
        if {n: v for n, v in self.fixed.items() if n not in constants} != call.fixed:
            return False
        given = specs.keys() - constants
        left_out = self.specs.keys() - given
        # What an encoder reads is given once: to its first step.
        allowed = self.specs.keys() if "decoder_input_ids" in self.specs else call.filled_in
        if not given <= self.specs.keys() or not left_out <= (allowed if self.use_cache else frozenset()):
            return False
        alike = all(_serves(self.specs[name], specs[name], call.tensors[name].shape) for name in given)
        return alike and all(ConstantTensor.of(call.tensors[name]) == self.fixed[name] for name in constants)


def _serves(made: InputSpec, asked: InputSpec, shape: torch.Size) -> bool:
    """Return whether a graph for `made` takes a tensor of this shape with the spec `asked`: dims are the same, or a
    number in the graph that is the tensor's size."""
    if made.dtype != asked.dtype or len(made.dims) != len(asked.dims):
        return False
    dims = zip(made.dims, asked.dims, shape, strict=True)
    return all(own in (other, size) for own, other, size in dims)
