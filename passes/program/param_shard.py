"""ParamShard: which slice of which parameter of the model a rank's parameter is."""

from __future__ import annotations

from dataclasses import dataclass

from cost_model.graph.placement import Interval


@dataclass(frozen=True, slots=True)
class ParamShard:
    """The source of one parameter (or buffer) of a rank's module: which intervals of which tensor of the model.

    `name` is its path in the rank's GraphModule, `source` in the original model's state. The rank holds the given
    `intervals` along `dim`, concatenated; `dim` is None for the whole tensor.
    """

    name: str
    source: str
    shape: tuple[int, ...]  # of the whole source tensor
    dtype: str  # "float32", ...
    dim: int | None = None
    intervals: tuple[Interval, ...] = ()
    is_buffer: bool = False

    @property
    def slice_key(self) -> tuple[object, ...]:
        """Returns which elements of which weight are held: equal for two shards that may be one tensor."""
        return self.source, self.dim, self.intervals, self.dtype, self.is_buffer

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Returns the shape of the rank's own tensor."""
        if self.dim is None:
            return self.shape
        held = sum(b - a for a, b in self.intervals)
        return (*self.shape[: self.dim], held, *self.shape[self.dim + 1 :])
