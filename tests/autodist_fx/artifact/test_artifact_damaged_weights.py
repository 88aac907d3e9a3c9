"""Weights of an artifact that were edited by hand are refused by file name, and nothing in them is run."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.artifacts import TOUCH, WEIGHTS, assert_refused, renew_digests


class _Run:
    def __reduce__(self) -> Any:
        return os.system, (TOUCH,)


def _header(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _with_header(content: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    header, data = _header(content)
    text = change(header)
    text = (text if isinstance(text, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + data


def _entry(**fields: Any) -> Callable[[bytes], bytes]:
    def change(header: dict[str, Any]) -> None:
        next(entry for name, entry in header.items() if name != "__metadata__").update(fields)

    return lambda content: _with_header(content, change)


def _overlapping(header: dict[str, Any]) -> None:
    one, other = [name for name in header if name != "__metadata__"][:2]
    header[other]["data_offsets"], header[other]["shape"] = header[one]["data_offsets"], header[one]["shape"]


def _drop_one(header: dict[str, Any]) -> None:
    del header[next(name for name in header if name != "__metadata__")]


WEIGHT_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a pickle": lambda content: pickle.dumps(_Run()),
    "a pickle with a header's length": lambda content: struct.pack("<Q", 40) + pickle.dumps(_Run()) + b" " * 100,
    "a huge header": lambda content: struct.pack("<Q", 2**63) + content[8:],
    "an empty header": lambda content: struct.pack("<Q", 0) + content[8:],
    "a header that is a list": lambda content: _with_header(content, lambda h: "[]"),
    "duplicate keys": lambda content: _with_header(content, lambda h: json.dumps(h)[:-1] + ', "__metadata__": {}}'),
    "NaN": lambda content: _with_header(content, lambda h: json.dumps(h).replace('"shape": [', '"shape": [NaN, ', 1)),
    "a header nested deeply": lambda content: _with_header(content, lambda h: "[" * 50_000),
    "an unknown dtype": _entry(dtype="PICKLE"),
    "another dtype": _entry(dtype="F16"),
    "another shape": _entry(shape=[1]),
    "a shape below zero": _entry(shape=[-1, -8]),
    "a huge shape": _entry(shape=[2**61, 8]),
    "a shape of texts": _entry(shape=["1"]),
    "offsets below zero": _entry(data_offsets=[-8, 0], shape=[1]),
    "offsets beyond the end": _entry(data_offsets=[0, 2**50], shape=[2**47]),
    "overlapping tensors": lambda content: _with_header(content, _overlapping),
    "bytes of no tensor": lambda content: content + b"\0" * 64,
    "one tensor less": lambda content: _with_header(content, _drop_one),
}


@pytest.mark.parametrize("kind", WEIGHT_DAMAGE)
def test_weights(kind: str, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(artifact.parent)
    (artifact / WEIGHTS).write_bytes(WEIGHT_DAMAGE[kind]((artifact / WEIGHTS).read_bytes()))
    assert_refused(artifact, r"weights/rank1\.safetensors")
    renew_digests(artifact)
    assert_refused(artifact, r"weights/rank1\.safetensors")


def test_the_pickle_would_run_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(_Run()))
    assert (tmp_path / "run").exists()


def test_tensors_of_another_shape_in_a_file_that_is_sound(artifact: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        name, entry = next((n, e) for n, e in header.items() if n != "__metadata__" and len(e["shape"]) == 2)
        entry["shape"] = entry["shape"][::-1] if entry["shape"][0] != entry["shape"][1] else [entry["shape"][0] ** 2]

    (artifact / WEIGHTS).write_bytes(_with_header((artifact / WEIGHTS).read_bytes(), change))
    renew_digests(artifact)
    assert_refused(artifact, r"rank1\.json: .* in the graph, and .* among the weights of rank 1")
