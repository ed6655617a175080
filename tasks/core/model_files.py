"""What copies of models often lack, seen without loading anything: better now than after an hour."""

import json
from pathlib import Path

LARGE = 1 << 20  # bytes of JSON from which on (a tokenizer's) only the end is looked at


def fault(directory: Path) -> str | None:
    """What is wrong with the JSON files and the safetensors of a model or an adapter, and the remedy; else None."""
    listed: set[str] = set()
    for path in sorted(directory.glob("*.json")):
        try:
            read = json.loads(path.read_bytes()) if path.stat().st_size < LARGE else None
        except ValueError as error:
            return f"{path} is not JSON ({error}): copy or download it again"
        if read is None and not _end(path).endswith(b"}"):
            return f"{path} is cut off: copy or download it again"
        if path.name.endswith(".safetensors.index.json"):
            listed |= set(read.get("weight_map", {}).values()) if read else set()
    weights = sorted(directory.glob("*.safetensors"))
    if lacking := sorted(listed - {path.name for path in weights}):
        return f"{directory} lacks {lacking[0]} ({len(lacking)} of {len(listed)} files): copy it again"
    return next((f"{path} {said}" for path in weights if (said := _fault(path))), None)


def _end(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-64, 2)
        return file.read().rstrip()


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
            return "is no safetensors file: its header is not JSON. Copy or download it again"
    tensors = [one for name, one in header.items() if name != "__metadata__"] if header is not None else []
    if header is None or size != 8 + length + max((one["data_offsets"][1] for one in tensors), default=0):
        return "is cut off: copy or download it again"
    return None
