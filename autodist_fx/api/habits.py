"""Keywords of transformers' from_pretrained: read as transformers means them, or refused with the way out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from autodist_fx.errors import AutodistError
from cost_model.request.devices import DeviceMap

# What these say is so anyway.
_ANYWAY = {
    "low_cpu_mem_usage": True, "use_safetensors": True, "weights_only": True, "use_cache": True,
    "output_loading_info": False, "force_download": False, "ignore_mismatched_sizes": False, "load_in_8bit": False,
    "load_in_4bit": False, "from_tf": False, "from_flax": False,
}  # fmt: skip
_WHOLE = "quantized weights are not split: lower dtype, or raise tp or pp"
_IN_MEMORY = "load the model with transformers, and split it by adx.compile(model, tp=..., pp=...).to_distributed()"
_WAY_OUT = {
    "load_in_8bit": _WHOLE,
    "load_in_4bit": _WHOLE,
    "quantization_config": _WHOLE,
    "low_cpu_mem_usage": "each rank reads its own slices straight into their tensors",
    "use_safetensors": "safetensors and GGUF are read, and never a pickle",
    "weights_only": "no pickle is read at all",
    "output_loading_info": "the model has it, as .load_report",
    "force_download": "delete the hub's cache of it, or name another cache_dir",
    "ignore_mismatched_sizes": _IN_MEMORY,
    "from_tf": _IN_MEMORY,
    "from_flax": _IN_MEMORY,
    "offload_folder": "weights stay on their ranks' devices: raise tp or pp until they fit",
    "offload_state_dict": "weights stay on their ranks' devices: raise tp or pp until they fit",
    "offload_buffers": "weights stay on their ranks' devices: raise tp or pp until they fit",
    "tp_plan": "the layout follows from the graph: say tp=N, and fix roles with pin=",
    "tp_size": "say tp=N",
    "device_mesh": "say tp=N and pp=M",
    "gguf_file": "give the file's path as the name",
    "use_cache": "the model is split for generating, with a cache; model(...) runs without one unless it is asked to",
    "config": _IN_MEMORY,
    "state_dict": _IN_MEMORY,
    "subfolder": _IN_MEMORY,
    "variant": _IN_MEMORY,
    "adapter_kwargs": _IN_MEMORY,
    "key_mapping": _IN_MEMORY,
}


def refuse_habits(others: Mapping[str, Any]) -> None:
    """Refuse keywords that from_pretrained does not have. Raises AutodistError where transformers' has it, which names
    the way out; TypeError, as Python does, where it is nobody's."""
    for name, value in others.items():
        if name in _ANYWAY and (value is None or value == _ANYWAY[name]):
            continue
        if name in _WAY_OUT:
            raise AutodistError(f"from_pretrained over ranks takes no {name}: {_WAY_OUT[name]}")
        raise TypeError(f"from_pretrained() got an unexpected keyword argument {name!r}")


def one_dtype(dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None) -> torch.dtype | str | None:
    """Return the dtype that is asked for under its name or its old one. Raises AutodistError where both are given, and
    differ."""
    if dtype is None or torch_dtype is None:
        return torch_dtype if dtype is None else dtype
    if str(dtype).removeprefix("torch.") != str(torch_dtype).removeprefix("torch."):
        raise AutodistError(f"dtype is {dtype} and torch_dtype, its old name, {torch_dtype}: give dtype alone")
    return dtype


def placed(
    device_map: Any, device: str | torch.device | None
) -> tuple[DeviceMap | None, str | torch.device | None]:
    """Return (the hardware of each stage, the device of this rank) for a `device_map` of ours or of transformers'.

    Of transformers' are "auto", by which each rank takes the device that it would take anyway, and one device for all
    modules: "cpu", "cuda:1", a torch.device, {"": "cuda"}. Raises AutodistError where device= names another.
    """
    if isinstance(device_map, Mapping) and [*device_map] == [""]:
        device_map = device_map[""]
        device_map = f"cuda:{device_map}" if isinstance(device_map, int) else device_map
    if device_map == "auto":
        return None, device
    if not (isinstance(device_map, torch.device) or (isinstance(device_map, str) and _is_device(device_map))):
        return device_map, device
    if device is not None and torch.device(device) != torch.device(device_map):
        raise AutodistError(f"device is {device} and device_map {device_map}: give device alone")
    return None, device_map


def _is_device(text: str) -> bool:
    try:
        torch.device(text)
    except RuntimeError:
        return False
    return True
