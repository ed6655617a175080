"""Takes a user's files and base models into the store, so that every machine works on the same verified bytes."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from prefect import get_run_logger, task

from tasks.core.errors import BadConfig, StorageUnavailable
from tasks.core.refs import FilesRef, ModelRef
from tasks.core.retry import TASK
from tasks.core.settings import Settings
from tasks.core.sources import gather
from tasks.core.store import open_store

# Configs, tokenizers and templates, and weights as safetensors only: a pickle is never taken.
MODEL_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "*.txt"]


@task(name="take-files", **TASK)
def take_files(files: Mapping[str, str]) -> FilesRef:
    """`{"train": SOURCE, "test": SOURCE, ...}` as one artifact; see `tasks.core.sources` for what a source can be."""
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory)
        size = sum(gather(split, source, target, get_run_logger().info) for split, source in files.items())
        store = open_store(Settings().store_uri)
        digest = store.put(target / "files")
    return FilesRef(uri=store.uri, digest=digest, facts={"bytes": size})


@task(name="take-model", task_run_name="take {source}", **TASK)
def take_model(source: str, revision: str | None = None) -> ModelRef:
    """A local model directory, or a model of the Hugging Face hub at `revision`, as an artifact.

    Raises `BadConfig` when it is neither, lacks config.json, or its safetensors are not all there.
    """
    local = Path(source).expanduser().absolute()
    if local.is_file():
        raise BadConfig(
            f"{source} is a file; give the directory with config.json, tokenizer and safetensors (a GGUF cannot be "
            "trained or quantized: give the model that it was made from)"
        )
    directory = local if local.is_dir() else _download(source, revision)
    _require_whole(source, directory)
    with tempfile.TemporaryDirectory() as staged:
        for pattern in MODEL_FILES:
            for path in directory.glob(pattern):
                (Path(staged) / path.name).symlink_to(path.resolve())
        store = open_store(Settings().store_uri)
        digest = store.put(Path(staged))
    return ModelRef(uri=store.uri, digest=digest, facts={"source": source})


def _require_whole(source: str, directory: Path) -> None:
    """Raises `BadConfig` for what a copy of a model often lacks: better now than after an hour."""
    if not (directory / "config.json").exists():
        raise BadConfig(f"{source}: {directory} holds no config.json, so it is not a model in Hugging Face's layout")
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise BadConfig(f"{source}: no *.safetensors in {directory}; convert its weights first (pickles are refused)")
    index = directory / "model.safetensors.index.json"
    for path in (directory / "config.json", *([index] if index.is_file() else [])):
        try:
            read = json.loads(path.read_bytes())
        except ValueError as error:
            raise BadConfig(f"{source}: {path} is not JSON ({error}): copy or download it again") from error
    listed = set(read.get("weight_map", {}).values())
    if lacking := sorted(listed - {path.name for path in weights}):
        raise BadConfig(
            f"{source}: {directory} lacks {lacking[0]} ({len(lacking)} of {len(listed)} files): copy it again"
        )
    for path in weights:
        if fault := _fault(path):
            raise BadConfig(f"{source}: {path} {fault}")


def _fault(weights: Path) -> str | None:
    """What is wrong with a safetensors file, by its header and its size; None when nothing is."""
    size = weights.stat().st_size
    with weights.open("rb") as file:
        first = file.read(8)
        if first == b"version ":
            return "is a pointer of git-lfs, not weights: run git lfs pull there"
        length = int.from_bytes(first, "little")
        try:
            header = json.loads(file.read(length)) if length < size else None
        except ValueError:
            return "is no safetensors file: its header is not JSON"
    tensors = [one for name, one in header.items() if name != "__metadata__"] if header is not None else []
    if header is None or size != 8 + length + max((one["data_offsets"][1] for one in tensors), default=0):
        return "is cut off: copy or download it again"
    return None


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
