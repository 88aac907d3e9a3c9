"""Every source gives what plain slicing of the whole tensor gives, and reads no more than that."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from autodist_fx.errors import CheckpointError
from autodist_fx.weights.sources import safetensors_file
from autodist_fx.weights.sources.module_source import ModuleSource
from autodist_fx.weights.sources.safetensors_source import INDEX_NAME, SafetensorsSource
from autodist_fx.weights.sources.source import WeightSource

STATE = {
    "w": torch.arange(7 * 10, dtype=torch.float32).reshape(7, 10),
    "cube": torch.arange(3 * 8 * 5, dtype=torch.float64).reshape(3, 8, 5),
    "half": torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "bias": torch.arange(9, dtype=torch.float32),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "empty": torch.zeros(0, 4),
    "flags": torch.tensor([True, False, True]),
}
SLICES = [
    ("w", None, ()),
    ("w", 0, ((0, 3),)),
    ("w", 0, ((3, 7),)),  # uneven: 3 + 4
    ("w", 0, ((0, 1), (4, 6))),
    ("w", 1, ((0, 5),)),
    ("w", 1, ((1, 3), (4, 5), (8, 10))),  # a third of each segment of a fused weight
    ("w", 1, ((2, 2),)),  # a rank that holds nothing
    ("w", 0, ()),
    ("cube", 0, ((1, 3),)),
    ("cube", 1, ((0, 2), (6, 8))),
    ("cube", 2, ((4, 5),)),
    ("half", 1, ((1, 3),)),
    ("bias", 0, ((2, 9),)),
    ("scalar", None, ()),
    ("empty", None, ()),
    ("empty", 1, ((0, 2),)),
    ("flags", 0, ((1, 3),)),
]


def plain(name: str, dim: int | None, intervals: tuple[tuple[int, int], ...]) -> torch.Tensor:
    whole = STATE[name]
    if dim is None:
        return whole
    pieces = [whole.narrow(dim, a, b - a) for a, b in intervals]
    return torch.cat(pieces, dim) if pieces else whole.narrow(dim, 0, 0)


def sharded(directory: Path) -> Path:
    names = sorted(STATE)
    halves = {"model-00001-of-00002.safetensors": names[:4], "model-00002-of-00002.safetensors": names[4:]}
    for file, held in halves.items():
        save_file({name: STATE[name] for name in held}, directory / file)
    weight_map = {name: file for file, held in halves.items() for name in held}
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


@pytest.fixture(params=["module", "single", "index"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> WeightSource:
    if request.param == "module":
        return ModuleSource(STATE)
    if request.param == "index":
        return SafetensorsSource(sharded(tmp_path))
    save_file(STATE, tmp_path / "model.safetensors")
    return SafetensorsSource(tmp_path)


@pytest.mark.parametrize(("name", "dim", "intervals"), SLICES)
def test_a_slice_is_what_plain_slicing_gives(source, name, dim, intervals):
    expected = plain(name, dim, intervals)
    got = source.read(name, dim, intervals)
    assert got.dtype == expected.dtype and torch.equal(got, expected)
    assert source.bytes_read == expected.numel() * expected.element_size()
    assert source.shape(name) == tuple(STATE[name].shape)


@pytest.mark.parametrize(("name", "dim", "intervals"), SLICES[:12])
def test_a_slice_is_cast_on_the_way(source, name, dim, intervals):
    expected = plain(name, dim, intervals)
    got = source.read(name, dim, intervals, torch.float16)
    assert got.dtype == torch.float16 and torch.equal(got, expected.to(torch.float16))
    assert source.bytes_read == expected.numel() * expected.element_size()  # of the checkpoint's dtype


def test_a_slice_lands_in_out(source):
    out = torch.full((7, 4), -1.0, dtype=torch.float64)
    assert source.read("w", 1, ((0, 2), (8, 10)), out=out) is out
    assert torch.equal(out, plain("w", 1, ((0, 2), (8, 10))).double())
    turned = torch.empty(4, 7).T  # not contiguous
    assert source.read("w", 1, ((0, 2), (8, 10)), out=turned) is turned
    assert torch.equal(turned, plain("w", 1, ((0, 2), (8, 10))))


@pytest.mark.parametrize("short", [0, 9, 1000])
@pytest.mark.parametrize("window", [1, 3, 16, 100])
@pytest.mark.parametrize(("name", "dim", "intervals"), SLICES)
def test_reading_in_windows_and_short_runs_equals_slicing(monkeypatch, tmp_path, short, window, name, dim, intervals):
    monkeypatch.setattr(safetensors_file, "WINDOW_BYTES", window)
    monkeypatch.setattr(safetensors_file, "SHORT_RUN_BYTES", short)
    save_file(STATE, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    expected = plain(name, dim, intervals)
    assert torch.equal(source.read(name, dim, intervals), expected)
    assert torch.equal(source.read(name, dim, intervals, torch.float16), expected.half())


def test_tensors_that_are_not_aligned(tmp_path):
    # A writer that does not pad its header: every tensor begins at an odd offset.
    values = torch.arange(6, dtype=torch.float32)
    header = json.dumps({"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    header += b" " * (1 - (8 + len(header)) % 2)
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + values.numpy().tobytes())
    assert (8 + len(header)) % 2 == 1
    assert torch.equal(SafetensorsSource(tmp_path).read("w", 1, ((1, 3),)), values.reshape(2, 3)[:, 1:])


def test_names_and_sizes(source):
    assert source.names() == set(STATE)
    assert source.checkpoint_bytes == sum(t.numel() * t.element_size() for t in STATE.values())
    assert source.bytes_read == 0


@pytest.mark.parametrize(
    ("name", "dim", "intervals", "message"),
    [
        ("nothing", None, (), "no tensor nothing"),
        ("w", 2, ((0, 1),), "there is no dim 2"),
        ("w", 1, ((8, 11),), r"\[8, 11\) is outside of dim 1"),
        ("w", 1, ((3, 2),), r"\[3, 2\) is outside of dim 1"),
    ],
)
def test_wrong_requests_name_the_tensor(source, name, dim, intervals, message):
    with pytest.raises(CheckpointError, match=message):
        source.read(name, dim, intervals)


def test_out_of_another_shape(source):
    with pytest.raises(CheckpointError, match=r"w: the slice has shape \[7, 2\], but `out` has \[2, 7\]"):
        source.read("w", 1, ((0, 2),), out=torch.empty(2, 7))


def test_a_model_in_memory_gives_copies_unless_asked_to_share():
    model = torch.nn.Linear(4, 4)
    assert ModuleSource(model).read("weight").data_ptr() != model.weight.data_ptr()
    shared = ModuleSource(model, share=True)
    assert shared.read("weight").data_ptr() == model.weight.data_ptr()
    assert not shared.read("weight").requires_grad
    assert shared.read("weight", dtype=torch.float16).dtype == torch.float16
    assert shared.read("weight", dtype=torch.float16).data_ptr() != model.weight.data_ptr()
    model = torch.nn.Linear(16, 4)
    shared = ModuleSource(model, share=True)
    rows, others = shared.read("weight", 0, ((1, 3),)), [((0, 1), (3, 4)), ((0, 2),)]
    copies = [shared.read("weight", dim, intervals) for dim, intervals in enumerate(others)]
    with torch.no_grad():
        model.weight.fill_(7.0)
    assert rows.eq(7.0).all() and not any(copy.eq(7.0).any() for copy in copies)
    assert shared.read("weight", 0).shape == (0, 16)
    norm = torch.nn.BatchNorm1d(2)
    assert ModuleSource(norm, share=True).read("running_mean").data_ptr() != norm.running_mean.data_ptr()


def test_a_tied_model_in_memory_has_both_names_and_counts_once():
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 3), "head": torch.nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    source = ModuleSource(model)
    assert source.names() == {"embed.weight", "head.weight"}
    assert source.checkpoint_bytes == 5 * 3 * 4


def test_a_model_on_meta_has_no_weights():
    with pytest.raises(CheckpointError, match=r"on the meta device \(weight\)"):
        ModuleSource(torch.nn.Linear(2, 2, device="meta"))


def test_files_that_are_broken(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        SafetensorsSource(tmp_path)
    for content in (b"", b"abc", b"\xff" * 64, struct.pack("<Q", 4) + b"nope", struct.pack("<Q", 2) + b"[]"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            SafetensorsSource(tmp_path)
    save_file(STATE, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="cut short"):
        SafetensorsSource(tmp_path)


def test_an_index_with_a_missing_shard_or_a_path(tmp_path):
    (sharded(tmp_path) / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names model-00002-of-00002\.safetensors, which is missing"):
        SafetensorsSource(tmp_path)
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"w": "../../etc/passwd"}}))
    with pytest.raises(CheckpointError, match="not a file beside it"):
        SafetensorsSource(tmp_path)
    (tmp_path / INDEX_NAME).write_text("{}")
    with pytest.raises(CheckpointError, match="no safetensors index"):
        SafetensorsSource(tmp_path)
