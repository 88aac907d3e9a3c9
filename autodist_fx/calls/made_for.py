"""`MadeFor`: the calls that a graph was made for. `simulate`, ranks and artifacts all find a call's graph by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autodist_fx.calls.call import Call
from autodist_fx.calls.input_spec import InputSpec


@dataclass(frozen=True, slots=True)
class MadeFor:
    """Calls with or without a cache, with inputs of these `forms`, and these values of the `fixed` arguments."""

    use_cache: bool
    fixed: Mapping[str, object]
    forms: Mapping[str, InputSpec]

    def takes(self, call: Call, forms: Mapping[str, InputSpec]) -> bool:
        """Return whether a call, whose tensors have these specs, is one that the graph was made for:"""
        if self.use_cache != call.use_cache or self.fixed != call.fixed:
            return False
        return forms.items() <= self.forms.items() if call.use_cache else forms == self.forms
