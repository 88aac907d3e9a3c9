"""An artifact that is not what was written is refused with the file's name, and nothing in it is run.

Each damage twice where that makes sense: as it happens on a disk, which the digests tell; and by a hand that makes the
digests anew, which the reading itself has to tell.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import autodist_fx as adx
from autodist_fx.api.artifact import Artifact
from autodist_fx.artifact.manifest import ArtifactError
from tests.support.artifacts import (
    TOUCH,
    WEIGHTS,
    assert_refused,
    edit_json,
    edit_manifest,
    read_everything,
    renew_digests,
)
from tests.support.models import padded_batch, tiny_model

PLAN, GRAPH, VARIANT = "plan.json", "variants/whole/rank1.json", "variants/decode/variant.json"
Damage = Callable[[Path], Any]


def test_an_intact_artifact_is_read(artifact: Path) -> None:
    read_everything(artifact)
    whole = adx.load(artifact)
    assert isinstance(whole, Artifact) and whole._repr_html_() == whole.plan._repr_html_()  # as notebooks show it
    renew_digests(artifact)
    read_everything(artifact)


# -- as it happens on a disk ------------------------------------------------------------------------------------------


def _every_file(saved: Path) -> list[str]:
    return sorted(p.relative_to(saved).as_posix() for p in saved.rglob("*") if p.is_file())


def test_a_bit_that_flips_in_any_file(artifact: Path) -> None:
    for name in _every_file(artifact):
        content = (artifact / name).read_bytes()
        for at in (0, len(content) // 2, len(content) - 2):
            changed = bytearray(content)
            changed[at] ^= 4
            (artifact / name).write_bytes(changed)
            assert_refused(artifact, name)
        (artifact / name).write_bytes(content)
    read_everything(artifact)


def test_a_file_that_is_cut_short_or_longer_or_missing(artifact: Path) -> None:
    for name in _every_file(artifact):
        content = (artifact / name).read_bytes()
        for changed in (content[: len(content) // 2], b"", content + b"x"):
            (artifact / name).write_bytes(changed)
            assert_refused(artifact, name)
        (artifact / name).unlink()
        assert_refused(artifact, name)
        (artifact / name).write_bytes(content)


def test_files_of_two_ranks_that_are_swapped(artifact: Path) -> None:
    def swap(one: str, other: str) -> None:
        (artifact / one).rename(artifact / "x")
        (artifact / other).rename(artifact / one)
        (artifact / "x").rename(artifact / other)

    graphs, weights = ("variants/whole/rank0.json", GRAPH), ("weights/rank0.safetensors", WEIGHTS)
    for pair in (graphs, weights):
        swap(*pair)
        assert_refused(artifact, "rank[01]")
        renew_digests(artifact)
        assert_refused(artifact, r"rank0.* is of rank 1|holds the weights of rank '1', and should hold those of rank 0")
        swap(*pair)
        renew_digests(artifact)


def test_a_file_that_nobody_wrote(artifact: Path) -> None:
    (artifact / "variants" / "whole" / "rank2.json").write_text("{}")
    assert_refused(artifact, r"variants/whole/rank2\.json is not in the manifest")


def test_links(artifact: Path) -> None:
    for name in (GRAPH, "manifest.json"):
        elsewhere = artifact.parent / "elsewhere"
        (artifact / name).rename(elsewhere)
        (artifact / name).symlink_to(elsewhere)
        assert_refused(artifact, name)
        (artifact / name).unlink()
        elsewhere.rename(artifact / name)
    (artifact / "more").symlink_to(artifact.parent)
    assert_refused(artifact, r"more is not in the manifest")


# -- by hand: the manifest --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../outside.json", "/etc/passwd.json", "variants/../../outside.json", "a/b/c/d.json", "weights/rank0.pkl", "x.bin",
     "./plan.json", "C:\\x.json", ".hidden.json", "variants//x.json", "manifest.json", "we\u0131ghts.json"],
)  # fmt: skip
def test_paths_in_the_manifest(name: str, artifact: Path) -> None:
    edit_manifest(artifact, lambda m: m["files"].update({name: {"bytes": 2, "sha256": "0" * 64}}))
    assert_refused(artifact, r"manifest\.json is malformed \(no file of an artifact is called")


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda m: m.update(format_version=1), "has format version 1, and this autodist_fx reads 5"),
        (lambda m: m.update(format="zip"), "is no manifest of an artifact"),
        (lambda m: m.update(tp=2**40), "malformed"),
        (lambda m: m.update(tp=2.5), "malformed"),
        (lambda m: m.update(pp=True), "malformed"),
        (lambda m: m.update(tp=3), "is for tp=2 x pp=1, and the manifest says tp=3"),
        (lambda m: m.pop("files"), "malformed"),
        (lambda m: m.update(files=[]), "malformed"),
        (lambda m: m.update(variants=["whole", "decode", "../x"]), r"variants/\.\./x/variant\.json is not in the"),
        (lambda m: m["files"][PLAN].update(bytes=10**30), "malformed"),
        (lambda m: m["files"][PLAN].update(bytes=-1), "malformed"),
        (lambda m: m["files"][PLAN].update(bytes="1"), "malformed"),
        (lambda m: m["files"][PLAN].update(sha256="a"), "malformed"),
        (lambda m: m["files"][PLAN].update(bytes=2**62), r"plan\.json has \d+ bytes, and had 4611686018427387904"),
        (lambda m: m.update(model="A\x1b[2J"), "malformed"),
        (lambda m: m.update(model=["x"]), "malformed"),
    ],
)
def test_an_edited_manifest(change: Damage, said: str, artifact: Path) -> None:
    edit_manifest(artifact, change)  # type: ignore[arg-type]
    assert_refused(artifact, said)


def test_a_manifest_that_is_edited_and_not_made_anew(artifact: Path) -> None:
    text = (artifact / "manifest.json").read_text()
    (artifact / "manifest.json").write_text(text.replace('"LlamaForCausalLM"', '"GPT2LMHeadModel"'))
    assert_refused(artifact, r"manifest\.json was changed after it was written")


def test_a_manifest_in_another_encoding(artifact: Path) -> None:
    text = (artifact / "manifest.json").read_text()
    (artifact / "manifest.json").write_text(text, encoding="utf-16")
    assert_refused(artifact, r"manifest\.json is not the JSON that was written")


@pytest.mark.parametrize("name", [PLAN, WEIGHTS, GRAPH])
def test_pipes_and_folders_in_place_of_files_are_refused(name: str, artifact: Path) -> None:
    """Opening a pipe would wait for ever, reading a device never end."""
    (artifact / name).unlink()
    os.mkfifo(artifact / name)
    assert_refused(artifact, rf"{name} is no plain file")
    (artifact / name).unlink()
    (artifact / name).mkdir()
    assert_refused(artifact, rf"{name} is missing")


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 2}', '{"a": NaN}', "[" * 100_000, '{"a": ' + "9" * 10_000 + "}", "[]", ""]
)
def test_a_manifest_that_is_no_json(text: str, artifact: Path) -> None:
    (artifact / "manifest.json").write_text(text)
    assert_refused(artifact, r"manifest\.json")


# -- by hand: graphs --------------------------------------------------------------------------------------------------


def _first(graph: dict[str, Any], op: str) -> dict[str, Any]:
    return next(node for node in graph["graph"]["nodes"] if node["op"] == op)


def _call(target: Any, *args: Any, **more: Any) -> Callable[[dict[str, Any]], None]:
    """A call of something else in place of the first function call."""

    def change(graph: dict[str, Any]) -> None:
        node = _first(graph, "call_function")
        node.update(target=target, args=list(args) or node["args"], **more)

    return change


def _node(kind: str, /, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda graph: _first(graph, kind).update(fields)


def _deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


GRAPHS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "os.system": (_call("os.system", TOUCH), "'os.system', which is not on the list of functions"),
    "eval": (_call("builtins.eval", "open('run', 'w')"), "'builtins.eval', which is not on the list"),
    "exec": (_call("builtins.exec", "open('run', 'w')"), "'builtins.exec', which is not on the list"),
    "dotted": (_call("torch.os.system", TOUCH), "'torch.os.system', which is not on the list"),
    "dotted more": (_call("operator.__class__.__base__"), "is not on the list"),
    "torch.load": (_call("torch.load", "x.pt"), "'torch.load', which is not on the list"),
    "torch.ops": (_call("torch.ops.load_library", "x.so"), "is not on the list"),
    "code": (_call("torch.add; open('run', 'w')"), "is not on the list"),
    "a list": (_call(["os.system"]), r"calls \['os.system'\]"),
    "getattr": (_call("builtins.getattr", 1, "__class__"), "for '__class__', which is not on its list"),
    "getattr with a default": (_call("builtins.getattr", 1, "shape", 2), "getattr with 3 arguments"),
    "getattr by keyword": (_call("builtins.getattr", 1, "shape", kwargs={"x": 1}), "which is not on its list"),
    "getattr of a node": (
        lambda g: _call("builtins.getattr", 1, {"node": g["graph"]["nodes"][0]["name"]})(g), "which is not on its list"
    ),
    "a method": (_node("call_method", target="__reduce__"), "the method '__reduce__', which is not on the list"),
    "apply_": (_node("call_method", target="apply_"), "which is not on the list of methods"),
    "a method of nothing": (_node("call_method", args=[1]), "which is not on the list of methods"),
    "an input as code": (_node("placeholder", target="x, y=open('run', 'w')"), "is no name"),
    "an input that hides": (_node("placeholder", target="torch"), "may not be a name there"),
    "a name as code": (_node("call_method", name="x; open('run', 'w')"), "is no name"),
    "a name of Python's": (_node("call_method", name="class"), "no node may have that name|which is no node"),
    "a keyword as code": (_call("torch.add", 1, 2, kwargs={"alpha=open('run', 'w'), x": 1}), "is no name"),
    "a module as code": (_node("call_module", target="lm_head'), open('run', 'w"), "calls the module"),
    "a module of modules": (_node("call_module", target="model"), "calls the module 'model', which is not there"),
    "a class as code": (lambda g: g["graph"].update({"class": "X:\n import os"}), "the class: .* is no name"),
    "a layer": (
        lambda g: g["graph"]["modules"]["lm_head"].update({"class": "subprocess.Popen"}), "not on the list of layers"
    ),
    "a layer's attribute": (lambda g: g["graph"]["modules"]["lm_head"].update(forward=1), "has no 'forward'"),
    "a layer's path": (lambda g: g["graph"]["modules"].update({"a b": {"class": "nn.Identity"}}), "is no name"),
    "a later node": (
        lambda g: _first(g, "call_method").update(args=[{"node": g["graph"]["nodes"][-2]["name"]}]), "no node before it"
    ),
    "an unknown node": (_node("call_method", args=[{"node": "nobody"}]), "takes 'nobody', which is no node before it"),
    "a node twice": (lambda g: g["graph"]["nodes"].insert(1, g["graph"]["nodes"][0]), "is there twice"),
    "no output": (lambda g: g["graph"]["nodes"].pop(), "does not end with its output"),
    "two outputs": (lambda g: g["graph"]["nodes"].append(g["graph"]["nodes"][-1]), "comes behind the output"),
    "another op": (_node("call_method", op="call_magic"), "is no op of a graph"),
    "deep": (_call("torch.add", _deep(40), 1), "more than 12 deep"),
    "deeper": (_call("torch.add", _deep(900), 1), "rank1.json"),
    "a large number": (_call("torch.add", 10**400, 1), "no whole number"),
    "a long text": (_call("torch.add", "x" * 100_000, 1), "no text that can be printed"),
    "an unknown value": (_call("torch.add", {"eval": "1"}, 1), "is no value"),
    "an unknown dtype": (_call("torch.add", {"dtype": "load"}, 1), "is no value"),
    "an unknown device": (_call("torch.add", {"device": "cpu; x"}, 1), "is no value"),
    "a huge tensor": (lambda g: g["graph"]["tensors"][0].update(shape=[2**60, 2**60]), "no tensor has shape"),
    "another shape": (lambda g: g["graph"]["tensors"][0].update(shape=[1]), r"in the graph, and .* among the weights"),
    "another dtype": (lambda g: g["graph"]["tensors"][0].update(dtype="float16"), "among the weights of rank 1"),
    "a tensor that hides": (lambda g: g["graph"]["tensors"][0].update(name="forward"), "hide|reads|not among"),
    "another weight": (lambda g: g["keys"].update(dict.fromkeys(g["keys"], "nobody")), "is not among the weights"),
    "no graph": (lambda g: g.pop("graph"), "rank1.json"),
    "a list of nodes": (lambda g: g["graph"].update(nodes=7), "is no list"),
    "another rank": (lambda g: g.update(rank=0), "is of rank 0"),
    "another mesh": (lambda g: g.update(mesh=[1, 2]), r"of the mesh \[1, 2\]"),
    "shards": (lambda g: g["shards"][0].update(intervals=[[-1, 2]]), "is no whole number"),
    "inputs": (lambda g: g.update(inputs=[]), "inputs or cache layers are not those of its graph"),
}


@pytest.mark.drawn(20)
@pytest.mark.parametrize("kind", GRAPHS)
def test_an_edited_graph(kind: str, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(artifact.parent)
    change, said = GRAPHS[kind]
    edit_json(artifact, GRAPH, change)
    with pytest.raises(ArtifactError, match=said) as caught:
        read_everything(artifact)
    assert GRAPH in str(caught.value) and "\n" not in str(caught.value)
    assert not (artifact.parent / "run").exists()


def test_other_edited_files(artifact: Path, saved: Path) -> None:
    """With digests made anew: what makes no sense is told by the file that says it."""
    changes: list[tuple[str, Callable[[Any], Any]]] = [
        (VARIANT, lambda f: f.update(inputs="x")),
        (VARIANT, lambda f: f["fixed"].update(x=[1])),
        (VARIANT, lambda f: f.update(name="whole")),
        (VARIANT, lambda f: f.update(encoder="nobody")),
        (VARIANT, lambda f: f.update(dtype="load")),
        (VARIANT, lambda f: f.update(guards={"graph": {}})),
        ("variants/whole/variant.json", lambda f: f["sources"].clear()),
        ("variants/whole/plan.json", lambda p: p.update(fingerprint="0" * 64)),
        ("plan.json", lambda p: p["ops"][0].update(home=-1)),
        ("plan.json", lambda p: p.update(version=99)),
        ("model.json", lambda m: m.update(main="nobody")),
        ("model.json", lambda m: m.update(forward=[["x y", "KEYWORD_ONLY", True, None]])),
        ("config.json", lambda c: c.update(model_type="nobody")),
        ("variants/whole/graph.json", lambda g: g["nodes"][0].update(target="a b")),
    ]
    for name, change in changes:
        edit_json(artifact, name, change)
        # a plan that is sound, and another graph's, is told by the graph
        assert_refused(artifact, "variants/whole/graph.json" if name == "variants/whole/plan.json" else name)
        shutil.copyfile(saved / name, artifact / name)
    renew_digests(artifact)
    read_everything(artifact)


# -- where it is written ----------------------------------------------------------------------------------------------


def test_a_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    compiled = adx.compile(tiny_model("gpt2"), tp=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(ArtifactError, match=f"{name} is there already and is no"):
            compiled.save(tmp_path / name)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x" and len(list(tmp_path.iterdir())) == 2


def test_an_artifact_is_replaced_and_a_failure_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autodist_fx.artifact import directory, writer

    compiled = adx.compile(tiny_model("gpt2"), tp=1)
    compiled.save(tmp_path / "saved")
    compiled.save(tmp_path / "saved")
    before = (tmp_path / "saved" / "manifest.json").read_bytes()
    for module, step in ((writer, "write_rank"), (writer, "finish"), (directory, "take_place")):
        with monkeypatch.context() as patch:
            patch.setattr(module, step, lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                compiled.save(tmp_path / "saved")
        assert (tmp_path / "saved" / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    ids, mask = padded_batch()
    with torch.no_grad():
        found = adx.load(tmp_path / "saved").simulate(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(found, compiled.simulate(input_ids=ids, attention_mask=mask).logits)
