"""Downloads from the Hugging Face hub: config.json alone, or
all that a safetensors checkpoint needs, and never a pickle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from autodist_fx.errors import CheckpointError
from autodist_fx.weights.checkpoint_source import CheckpointSource
from autodist_fx.weights.sources.safetensors_source import INDEX_NAME, SINGLE_NAME
from autodist_fx.weights.versions import HTTP_ERROR, NO_NETWORK

# Exact names, not "*.safetensors": repositories also have fp16 copies, adapters and other formats of the same weights.
_PATTERNS = (
    *(SINGLE_NAME, INDEX_NAME, "model-?????-of-?????.safetensors"),
    *("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"),  # config, generation config, tokenizer
)
_SUBFOLDERS = ("*/*",)  # onnx/, original/, ...
_CODE = "*.py"  # for trust_remote_code alone


def download_config(source: CheckpointSource) -> Path:
    """Download a repository's config.json, with trust_remote_code its code, too,
    and return the config's path in the hub's cache. Raises CheckpointError."""
    repo_id, offline = str(source.name), _files(source) is None
    if source.trust_remote_code:
        return _snapshot(source, offline, ["*.json", _CODE]) / "config.json"
    return Path(
        _ask(
            repo_id,
            lambda: hf_hub_download(
                repo_id,
                "config.json",
                revision=source.revision,
                token=source.token,
                cache_dir=source.cache_dir,
                local_files_only=offline,
            ),
        )
    )


def download_checkpoint(source: CheckpointSource) -> Path:
    """Download a repository's safetensors checkpoint and return its snapshot directory.

    Raises CheckpointError; before anything is downloaded where the repository has no safetensors.
    """
    repo_id, files = str(source.name), _files(source)
    offline = files is None
    if files is not None:
        _refuse_without_safetensors(repo_id, files)
    return _snapshot(source, offline, [*_PATTERNS, *([_CODE] if source.trust_remote_code else [])])


def _snapshot(source: CheckpointSource, offline: bool, patterns: list[str]) -> Path:
    """Download the files of a repository whose names match, and return their directory."""
    repo_id = str(source.name)
    return Path(
        _ask(
            repo_id,
            lambda: snapshot_download(
                repo_id,
                revision=source.revision,
                token=source.token,
                cache_dir=source.cache_dir,
                local_files_only=offline,
                allow_patterns=patterns,
                ignore_patterns=list(_SUBFOLDERS),
            ),
        )
    )


def _files(source: CheckpointSource) -> list[str] | None:
    """List the repository's files; None where only the cache can be asked.

    It also runs before config.json alone is downloaded: without network it fails at once, where a download would retry
    for half a minute.
    """
    repo_id = str(source.name)
    if constants.HF_HUB_OFFLINE if source.local_files_only is None else source.local_files_only:
        return None
    try:
        return HfApi(token=source.token).list_repo_files(repo_id, revision=source.revision)
    except NO_NETWORK:
        return None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise _explain(repo_id, error) from error


def _refuse_without_safetensors(repo_id: str, files: list[str]) -> None:
    """Raise CheckpointError where a repository has no safetensors, with the way out for the formats that it has."""
    if SINGLE_NAME in files or INDEX_NAME in files:
        return
    ggufs = [name for name in files if name.endswith(".gguf")]
    if ggufs:
        raise CheckpointError(
            f"{repo_id} holds GGUF files: download one (hf download {repo_id} {ggufs[0]}) and give its path"
        )
    if any(name.endswith((".bin", ".pt", ".pth")) for name in files):
        raise CheckpointError(
            f"{repo_id} has only pickled weights, which can run any code and are never opened here: "
            "load it where you trust it and save_pretrained(directory, safe_serialization=True)"
        )
    raise CheckpointError(f"{repo_id} has no safetensors weights: is it a transformers model?")


def _ask(repo_id: str, download: Callable[[], str]) -> str:
    """Run a download; turn its exceptions into CheckpointError."""
    try:
        return download()
    except (HTTP_ERROR, HFValidationError, OSError, ValueError) as error:
        raise _explain(repo_id, error) from error


def _explain(repo_id: str, error: Exception) -> CheckpointError:
    """Choose the CheckpointError for an exception of huggingface_hub."""
    # The order matters: these are subclasses of one another.
    if isinstance(error, HFValidationError):
        return CheckpointError(f"{repo_id!r} is neither a path here nor an id on the hub (owner/name)")
    if isinstance(error, GatedRepoError):
        return CheckpointError(f"{repo_id} is gated: accept its terms on huggingface.co, then set HF_TOKEN")
    if isinstance(error, RepositoryNotFoundError):
        return CheckpointError(f"no model {repo_id}, neither here nor on the hub: check the name, or set HF_TOKEN")
    if isinstance(error, RevisionNotFoundError):
        return CheckpointError(f"{repo_id} has no such revision: check its branches and tags on huggingface.co")
    if isinstance(error, (LocalEntryNotFoundError, *NO_NETWORK)):
        return CheckpointError(
            f"no directory {repo_id} here, it is not in the hub's cache, and huggingface.co cannot be reached "
            "(or HF_HUB_OFFLINE is set): check the name and the network"
        )
    if isinstance(error, EntryNotFoundError):
        return CheckpointError(f"{repo_id} has no config.json on the hub: is it a transformers model?")
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return CheckpointError(f"cannot download {repo_id}: {reason}; try again, or download it by hand and give its path")
