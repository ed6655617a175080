"""Finds incomplete or damaged model files from their headers and sizes, without loading anything."""

import json
from pathlib import Path

LARGE = 1 << 20  # bytes; of a larger JSON file (a tokenizer's) only the end is checked


def find_defect(directory: Path) -> str | None:
    """The first defect of the JSON files and safetensors of a model or adapter, with the remedy; None without one."""
    indexed: set[str] = set()
    for path in sorted(directory.glob("*.json")):
        try:
            content = json.loads(path.read_bytes()) if path.stat().st_size < LARGE else None
        except ValueError as error:
            return f"{path} is not JSON ({error}): copy or download it again"
        if content is None and not _end(path).endswith(b"}"):
            return f"{path} is cut off: copy or download it again"
        if path.name.endswith(".safetensors.index.json"):
            indexed |= set(content.get("weight_map", {}).values()) if content else set()
    weights = sorted(directory.glob("*.safetensors"))
    if missing := sorted(indexed - {path.name for path in weights}):
        return f"{directory} lacks {missing[0]} ({len(missing)} of {len(indexed)} files): copy it again"
    return next((f"{path} {defect}" for path in weights if (defect := _safetensors_defect(path))), None)


def _end(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-64, 2)
        return file.read().rstrip()


def _safetensors_defect(weights: Path) -> str | None:
    """The defect of a safetensors file, by its header and its size; None without one."""
    size = weights.stat().st_size
    with weights.open("rb") as file:
        first = file.read(8)
        if first == b"version ":
            return "is a pointer of git-lfs, not weights: run git lfs pull there"
        length = int.from_bytes(first, "little")
        try:
            header = json.loads(file.read(length)) if length < size else None
        except ValueError:
            return "is no safetensors file: its header is not JSON. Copy or download it again"
    tensors = [tensor for name, tensor in header.items() if name != "__metadata__"] if header is not None else []
    if header is None or size != 8 + length + max((tensor["data_offsets"][1] for tensor in tensors), default=0):
        return "is cut off: copy or download it again"
    return None
