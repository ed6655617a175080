"""Verified checkpoints: safetensors and JSON only, a manifest of SHA-256 written last, the newest two kept.

write(root, step, tensors, documents, fingerprint)
newest(root, fingerprint, warn)    # the newest whose files match their manifest, or None
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "manifest.json"
MAX_CHECKPOINTS = 2


def write(
    root: Path, step: int, tensors: dict[str, dict[str, Tensor]], documents: dict[str, Any], fingerprint: str
) -> Path:
    """Writes `<root>/checkpoint-<step>`: one file for each of `tensors` and `documents`, then the manifest.

    `fingerprint` is a digest of what decides the run (config, data, model): `newest` takes no other run's.
    """
    directory = root / f"checkpoint-{step}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for name, group in tensors.items():
        save_file({key: value.detach().contiguous() for key, value in group.items()}, directory / f"{name}.safetensors")
    for name, document in documents.items():
        (directory / f"{name}.json").write_text(json.dumps(document))
    files = {path.name: _sha256(path, sync=True) for path in sorted(directory.iterdir())}
    with (directory / MANIFEST).open("w") as file:
        json.dump({"step": step, "made_by": fingerprint, "files": files}, file)
        file.flush()
        os.fsync(file.fileno())
    for superseded in _by_step(root)[MAX_CHECKPOINTS:]:
        shutil.rmtree(superseded)
    return directory


def newest(root: Path, fingerprint: str, warn: Callable[[str], None]) -> Path | None:
    """The newest intact checkpoint of this run; damaged ones and other runs' are removed with a warning."""
    for directory in _by_step(root):
        problem = _problem(directory, fingerprint)
        if problem is None:
            return directory
        warn(f"checkpoint {directory.name} is not used: {problem}")
        shutil.rmtree(directory)
    return None


def read(directory: Path, name: str) -> dict[str, Tensor]:
    """One group of tensors of a checkpoint, on the CPU."""
    return load_file(directory / f"{name}.safetensors")


def read_state(directory: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    state: dict[str, Any] = json.loads((directory / "state.json").read_text())
    return state


def read_step(directory: Path) -> int:
    """Finished optimizer steps of a checkpoint."""
    return int(json.loads((directory / "trainer_state.json").read_text())["global_step"])


def discard_after(root: Path, step: int) -> None:
    """Removes the checkpoints of more than `step` steps."""
    for directory in _by_step(root):
        if int(directory.name.rpartition("-")[2]) > step:
            shutil.rmtree(directory)


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """States of torch's, numpy's and Python's generators, as tensors and JSON."""
    tensors = {"cpu": torch.get_rng_state()}
    tensors |= {f"cuda{i}": value for i, value in enumerate(torch.cuda.get_rng_state_all())}
    name, keys, *numbers = numpy.random.get_state(legacy=True)
    return tensors, {"python": random.getstate(), "numpy": [name, [int(key) for key in keys], *numbers]}


def restore_random_state(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Sets the generators to what `random_state` returned."""
    torch.set_rng_state(tensors["cpu"])
    for i in range(min(torch.cuda.device_count(), len(tensors) - 1)):
        torch.cuda.set_rng_state(tensors[f"cuda{i}"], i)
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *position = state["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *position))


def _problem(directory: Path, fingerprint: str) -> str | None:
    """Why a checkpoint cannot be resumed from; None for one that can."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
    except (OSError, ValueError):
        return "its writing did not end"
    if manifest.get("made_by") != fingerprint:
        return "another run made it (other settings, rows or model)"
    for name, digest in manifest["files"].items():
        if not (directory / name).is_file() or _sha256(directory / name) != digest:
            return f"{name} is not what was written (sha256 differs)"
    return None


def _by_step(root: Path) -> list[Path]:
    """Checkpoint directories, newest first."""
    return sorted(root.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2]))


def _sha256(path: Path, sync: bool = False) -> str:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
