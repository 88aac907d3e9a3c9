"""A checkpoint under the names and in the shapes of transformers 5's model, read in slices.

transformers 5 converts hub checkpoints while it loads them: names are changed, and tensors put together.

    mlp.experts.gate_up_proj [experts, 2 * inner, hidden]
        = cat((stack(experts.*.gate_proj.weight), stack(experts.*.up_proj.weight)), dim=1)
    read("mlp.experts.gate_up_proj", dim=0, ((0, 4),))
        reads gate_proj and up_proj of the first four experts, and nothing else

Its own code runs on promised tensors (promised.py), which tell what each tensor of the model consists of. A conversion
that computes more than places of elements runs on whole tensors each time a slice of its result is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from autodist_fx.errors import CheckpointError
from autodist_fx.weights.sources.expressions import Cuts, Expression, Stored, narrowed
from autodist_fx.weights.sources.promised import NotFollowedError, Promised
from autodist_fx.weights.sources.source import WeightSource, sliced_shape
from cost_model.graph.placement import Interval


class ConvertedSource:
    """The tensors of `source` as `model` has them, a model of transformers 5 that may be on meta.

    A tensor that is not the model's keeps its name, renamed as transformers would. `twins`: by name, other names that
    the model ties to it; where the checkpoint has several of them, a slice is compared with theirs as it is read, and
    CheckpointError raised where they differ, since transformers would then not tie them.
    """

    def __init__(self, source: WeightSource, model: PreTrainedModel, twins: Mapping[str, Sequence[str]]) -> None:
        self._source, self._model, self._twins = source, model, twins

    @property
    def bytes_read(self) -> int:
        return self._source.bytes_read

    @property
    def checkpoint_bytes(self) -> int:
        return self._source.checkpoint_bytes

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._tensor(name).dtype

    def read(
        self,
        name: str,
        dim: int | None = None,
        intervals: Sequence[Interval] = (),
        dtype: torch.dtype | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See WeightSource.read."""
        tensor = self._tensor(name)
        shape = sliced_shape(name, tensor.shape, dim, intervals, out)
        if out is None:
            out = torch.empty(shape, dtype=dtype or tensor.dtype)
        cuts = {} if dim is None else {dim: tuple(intervals)}
        tensor.fill(out, cuts)
        for twin in self._twins.get(name, ()):
            if twin in self._tensors:
                other = torch.empty_like(out)
                if self.shape(twin) == tensor.shape:
                    self._tensors[twin].fill(other, cuts)
                if self.shape(twin) != tensor.shape or not torch.equal(out, other):
                    raise CheckpointError(
                        f"the config ties {name} and {twin}, and the checkpoint has different values for them: set "
                        "tie_word_embeddings=false in its config.json, or leave one of them out"
                    )
        return out

    def fingerprint(self) -> str:
        """See WeightSource.fingerprint: of the checkpoint as it is stored."""
        return self._source.fingerprint()

    def close(self) -> None:
        self._source.close()

    def _tensor(self, name: str) -> Expression:
        if name not in self._tensors:
            self._source.shape(name)  # raises, and names the files
            raise CheckpointError(f"{name} is no tensor of {type(self._model).__name__}")
        return self._tensors[name]

    @cached_property
    def _tensors(self) -> dict[str, Expression]:
        """The model's tensors that the checkpoint has, by name.

        Names are found as transformers.core_model_loading.convert_and_load_state_dict_in_model finds them.
        """
        model, wanted = self._model, self._model.state_dict()
        mapping = get_model_conversion_mapping(model)
        renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        converters = [each for each in mapping if isinstance(each, WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        found: dict[str, Expression] = {}
        collected: dict[str, _Conversion] = {}
        for key in sorted(self._source.names(), key=dot_natural_key):  # expert 10 behind expert 9
            name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, wanted)
            if name not in wanted and key in wanted:
                name, pattern = rename_source_key(key, [], [], model.base_model_prefix, wanted)
            stored = Stored(self._source, key)
            if pattern is None or name not in wanted:
                found[name] = stored
            else:
                first = _Conversion(by_pattern[pattern], name, model, wanted[name].dtype)
                collected.setdefault(name, first).operands.setdefault(pattern, []).append(stored)
        for conversion in collected.values():
            found |= conversion.results()
        return found


class _Conversion:
    """One converter of transformers, and the stored tensors that its patterns matched."""

    def __init__(self, converter: WeightConverter, name: str, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._converter, self._name, self._model, self._dtype = converter, name, model, dtype
        self.operands: dict[str, list[Stored]] = {}

    def results(self) -> dict[str, Expression]:
        """Return what the converter makes of its operands, by name. Raises CheckpointError."""
        try:
            return {name: x.expression for name, x in self._run(lambda x: Promised(x, self._dtype)).items()}
        except NotFollowedError:
            pass  # an op of more than places
        except Exception as error:
            raise self._failed(error) from error
        try:
            shapes = self._run(lambda x: torch.empty(x.shape, dtype=self._dtype, device="meta"))
        except Exception as error:
            raise self._failed(error) from error
        stored = {operand.dtype for operands in self.operands.values() for operand in operands}
        # Integers beside floating-point scales are a way to store numbers; by themselves they are refused (load.py).
        dtype = self._dtype if any(each.is_floating_point for each in stored) else stored.pop()
        return {name: _Computed(self, name, tuple(x.shape), dtype) for name, x in shapes.items()}

    def whole(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Compute a result of whole operands, which are cast before, as transformers does."""
        return self._run(lambda x: x.source.read(x.name, dtype=dtype))[name]

    def _run(self, make: Any) -> dict[str, Any]:
        converter = deepcopy(self._converter)
        for pattern, operands in self.operands.items():
            for operand in operands:
                converter.add_tensor(self._name, operand.name, pattern, make(operand))
        results = converter.convert(self._name, model=self._model, config=self._model.config)
        return {name: x[0] if isinstance(x, list) else x for name, x in results.items()}

    def _failed(self, error: Exception) -> CheckpointError:
        stored = next(iter(self.operands.values()))[0].name
        line = (str(error).splitlines() or [type(error).__name__])[0]
        return CheckpointError(
            f"transformers cannot make {self._name} of {stored} and its like ({line}): "
            "is it the checkpoint of this model?"
        )


class _Computed:
    """A result of a conversion that is computed of whole tensors whenever a slice of it is read."""

    def __init__(self, conversion: _Conversion, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._conversion, self._name, self.shape, self.dtype = conversion, name, shape, dtype

    def fill(self, out: torch.Tensor, cuts: Cuts) -> None:
        """Compute the whole tensor and copy the slice."""
        out.copy_(narrowed(self._conversion.whole(self._name, out.dtype), cuts))
