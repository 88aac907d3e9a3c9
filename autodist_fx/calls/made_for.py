"""`MadeFor`: the calls that a graph was made for. `simulate`, ranks and artifacts all find a call's graph by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autodist_fx.calls.call import Call
from autodist_fx.calls.input_spec import InputSpec


@dataclass(frozen=True, slots=True)
class MadeFor:
    """Calls with or without a cache, with inputs of these `specs`, and these values of the `fixed` arguments."""

    use_cache: bool
    fixed: Mapping[str, object]
    specs: Mapping[str, InputSpec]

    def takes(self, call: Call, specs: Mapping[str, InputSpec]) -> bool:
        """Return whether the graph was made for a call whose tensors have these specs: with a cache, what the call
        leaves out is filled in; without one nothing is."""
        if self.use_cache != call.use_cache or self.fixed != call.fixed:
            return False
        return specs.items() <= self.specs.items() if call.use_cache else specs == self.specs
