"""Chooses the hardware that plans are predicted for where nobody names any: this machine, where it was measured."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from huggingface_hub import constants

from cost_model.costs.hardware import Hardware
from cost_model.request.hardware_file import SUFFIX, load_hardware

ENVIRONMENT = "ADX_HARDWARE"  # names the hardware in place of all that follows


def default_hardware() -> str | Hardware:
    """Return what ADX_HARDWARE names, else this machine as `autodist-fx measure` found it, else the name of a preset:
    "generic" where CUDA is there, "cpu-gloo" where not.

    A machine's links were measured between ranks on it: ranks of several machines are predicted for a preset. Raises
    PlanError for a file of the machine that is damaged.
    """
    if said := os.environ.get(ENVIRONMENT):
        return said
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    file = measured_file(kind)
    if file.is_file() and os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
        return load_hardware(file)[0]
    return "generic" if kind == "cuda" else "cpu-gloo"


def measured_file(kind: str) -> Path:
    """Return where this machine's figures are kept for the kind of device "cpu" or "cuda":
    HF_HOME/autodist_fx/hardware/cpu-amd-epyc-25-1-2-cores.json."""
    return Path(constants.HF_HOME) / "autodist_fx" / "hardware" / f"{machine_name(kind)}{SUFFIX}"


def machine_name(kind: str) -> str:
    """Return a name that is another one on machines of another kind: "cpu-amd-epyc-25-1-2-cores"."""
    count, unit = (torch.cuda.device_count(), "gpus") if kind == "cuda" else (cores(), "cores")
    processor = re.sub(r"[^a-z0-9]+", "-", processor_name(kind).lower()).strip("-")
    return f"{kind}-{processor}-{count}-{unit}"


def processor_name(kind: str) -> str:
    """Return the name of the GPU; of the CPU the name, family and model as Linux has them, else its architecture."""
    if kind == "cuda":
        return str(torch.cuda.get_device_name())
    try:
        said = Path("/proc/cpuinfo").read_text()
    except OSError:
        said = ""
    parts = [re.search(rf"^{key}\s*:\s*(.+)$", said, re.MULTILINE) for key in ("model name", "cpu family", "model")]
    return " ".join(part[1] for part in parts if part) or os.uname().machine


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
