"""Differences between the versions of transformers, and of the huggingface_hub under them, where weights are read.

Which of two ways is taken follows from what is there, never from a version number.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from transformers import PreTrainedModel

from autodist_fx.weights.sources.source import WeightSource

_CONVERTS = importlib.util.find_spec("transformers.core_model_loading") is not None  # transformers 5 does

# huggingface_hub speaks HTTP through requests before 1.0, and through httpx (httpx2) since.
_HTTP = importlib.import_module(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])

NO_NETWORK: tuple[type[Exception], ...]
HTTP_ERROR: type[Exception]
if hasattr(_HTTP, "TransportError"):
    NO_NETWORK = (_HTTP.TransportError, OfflineModeIsEnabled)
    HTTP_ERROR = _HTTP.HTTPError
else:
    NO_NETWORK = (_HTTP.ConnectionError, _HTTP.Timeout, OfflineModeIsEnabled)
    HTTP_ERROR = _HTTP.RequestException


def named_as_in(model: PreTrainedModel, source: WeightSource) -> WeightSource:
    """Return a checkpoint under the names of `model`, as far as transformers has rules for it that concern contents.

    transformers 5 puts tensors together while it loads them (ConvertedSource); 4.57 changes names only (`name_rules`).
    """
    if not _CONVERTS:
        return source
    from autodist_fx.weights.sources.converted_source import ConvertedSource

    twins = {name: group[i + 1 :] for group in tied_names(model) for i, name in enumerate(group)}
    return ConvertedSource(source, model, twins)


def name_rules(model: PreTrainedModel) -> dict[str, Any]:
    """Return the arguments of resolve_names by which 4.57 finds a model's names in a checkpoint; none where
    `named_as_in` has found them."""
    if _CONVERTS:
        return {}
    mapping = getattr(model, "_checkpoint_conversion_mapping", None)
    return {"base_model_prefix": model.base_model_prefix, "key_mapping": mapping}


def tied_names(model: PreTrainedModel) -> list[list[str]]:
    """List the names of each parameter that has several, the one first that the others follow in a checkpoint.

    transformers 5 says which (`all_tied_weights_keys`); in 4.57 it is the first in the order of modules.
    """
    owners = set(getattr(model, "all_tied_weights_keys", {}).values())
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [sorted(group, key=lambda name: name not in owners) for group in names.values() if len(group) > 1]
