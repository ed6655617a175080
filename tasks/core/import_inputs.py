"""Imports a user's files and base models into the store, so that every machine works on the same verified bytes."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from prefect import get_run_logger, task

from tasks.core.errors import BadConfig, StorageUnavailable
from tasks.core.model_files import find_defect
from tasks.core.refs import FilesRef, ModelRef
from tasks.core.retry import TASK_OPTIONS
from tasks.core.settings import Settings
from tasks.core.sources import collect_source
from tasks.core.store import open_store

# Configs, tokenizers and templates, and weights as safetensors only: pickles are never imported.
MODEL_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "*.txt"]


@task(name="import-files", **TASK_OPTIONS)
def import_files(files: Mapping[str, str]) -> FilesRef:
    """Stores `{"train": SOURCE, "test": SOURCE, ...}` as one artifact; `tasks.core.sources` lists kinds of sources."""
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory)
        size = sum(collect_source(split, source, target, get_run_logger().info) for split, source in files.items())
        store = open_store(Settings().store_uri)
        digest = store.put(target / "files")
    return FilesRef(uri=store.uri, digest=digest, facts={"bytes": size})


@task(name="import-model", task_run_name="import {source}", **TASK_OPTIONS)
def import_model(source: str, revision: str | None = None) -> ModelRef:
    """Stores a local model directory, or a model of the Hugging Face hub at `revision`, as an artifact.

    Raises `BadConfig` when it is neither, lacks config.json, or lacks one of its safetensors.
    """
    local = Path(source).expanduser().absolute()
    if local.is_file():
        raise BadConfig(
            f"{source} is a file; give the directory with config.json, tokenizer and safetensors (a GGUF cannot be "
            "trained or quantized: give the model that it was made from)"
        )
    directory = local if local.is_dir() else _download(source, revision)
    _require_complete(source, directory)
    with tempfile.TemporaryDirectory() as links:
        for pattern in MODEL_FILES:
            for path in directory.glob(pattern):
                (Path(links) / path.name).symlink_to(path.resolve())
        store = open_store(Settings().store_uri)
        digest = store.put(Path(links))
    return ModelRef(uri=store.uri, digest=digest, facts={"source": source})


def _require_complete(source: str, directory: Path) -> None:
    """Raises `BadConfig` for a directory that is not a complete model."""
    if not (directory / "config.json").exists():
        raise BadConfig(f"{source}: {directory} holds no config.json, so it is not a model in Hugging Face's layout")
    if not any(directory.glob("*.safetensors")):
        raise BadConfig(f"{source}: no *.safetensors in {directory}; convert its weights first (pickles are refused)")
    if defect := find_defect(directory):
        raise BadConfig(f"{source}: {defect}")


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import constants, errors, snapshot_download  # noqa: PLC0415  (slow to import, rarely needed)

    get_run_logger().info("fetching %s from the hub", name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=MODEL_FILES))
    except errors.GatedRepoError as error:
        raise BadConfig(f"{name} is gated: accept its licence on the hub and set HF_TOKEN ({error})") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise BadConfig(
            f"base model {name!r} is neither a directory here ({Path(name).absolute()}) nor a model on the hub; "
            f"for a private one set HF_TOKEN ({error})"
        ) from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        if constants.HF_HUB_OFFLINE:
            raise BadConfig(
                f"base model {name!r} is neither a directory here nor in the hub's cache, and HF_HUB_OFFLINE is set"
            ) from error
        raise StorageUnavailable(
            f"base model {name!r} is not a directory here, and the hub does not answer: {error}"
        ) from error
