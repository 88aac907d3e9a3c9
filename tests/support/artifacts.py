"""Edits of artifacts on disk, with digests that know of them; and what reading them then says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import autodist_fx as adx
from autodist_fx.api.artifact import Artifact
from autodist_fx.artifact.manifest import ArtifactError, digest_of
from tests.support.models import padded_batch

WEIGHTS = "weights/rank1.safetensors"
TOUCH = "touch run"  # a command that would leave a file, were anything in an artifact ever run


def read_everything(directory: Path) -> None:
    artifact = adx.load(directory)
    assert isinstance(artifact, Artifact)
    artifact.tokenizer()
    _ = artifact.plan, artifact.generation_config, artifact.config
    ids, mask = padded_batch()
    artifact.simulate(input_ids=ids, attention_mask=mask)


def assert_refused(directory: Path, pattern: str) -> None:
    canary = directory.parent / "run"
    with pytest.raises(ArtifactError, match=pattern) as caught:
        read_everything(directory)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert not canary.exists()


def renew_digests(directory: Path) -> None:
    """The manifest's digests, made anew of what is there."""
    fields = json.loads((directory / "manifest.json").read_text())
    for name in fields["files"]:
        content = (directory / name).read_bytes()
        fields["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_manifest(directory, fields)


def write_manifest(directory: Path, fields: dict[str, Any]) -> None:
    fields.pop("manifest_sha256", None)
    (directory / "manifest.json").write_text(json.dumps({**fields, "manifest_sha256": digest_of(fields)}))


def edit_manifest(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    fields = json.loads((directory / "manifest.json").read_text())
    change(fields)
    write_manifest(directory, fields)


def edit_json(directory: Path, name: str, change: Callable[[Any], Any]) -> None:
    """An edited file, and digests that know of it."""
    value = json.loads((directory / name).read_text())
    change(value)
    (directory / name).write_text(json.dumps(value))
    renew_digests(directory)
