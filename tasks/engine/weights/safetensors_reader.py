"""Reads safetensors files lazily: headers at once, values rows at a time.

Reads the files itself (the format: huggingface.co/docs/safetensors), because a memory map counts as resident memory.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tasks.core.errors import BadConfig, Corrupted

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file, not yet read; `offset` in bytes from the file's beginning."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` of the first dimension, or the whole tensor; raises Corrupted for a short file."""
        shape = self.shape
        row_bytes = math.prod(shape[1:]) * self.dtype.itemsize
        if shape:
            stop = shape[0] if stop is None else min(stop, shape[0])
            shape = (stop - start, *shape[1:])
        flat = torch.empty(math.prod(shape), dtype=self.dtype)
        buffer = flat.view(torch.uint8).numpy().data
        with self.file.open("rb") as file:
            file.seek(self.offset + start * row_bytes)
            if file.readinto(buffer) != len(buffer):
                raise Corrupted(f"{self.file} ends within a tensor: copy or download it again")
        return flat.reshape(shape)


def stored_tensors(directory: Path, stem: str = "model") -> dict[str, StoredTensor]:
    """Every tensor of `stem`.safetensors or of the shards its index names, in name order; only headers are read.

    Raises BadConfig when there are no safetensors, Corrupted for a header that is none or a missing shard.
    """
    index = directory / f"{stem}.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    elif (directory / f"{stem}.safetensors").is_file():
        files = [f"{stem}.safetensors"]
    else:
        raise BadConfig(
            f"{directory} has no {stem}.safetensors (nor an index of shards). Pickled weights (.bin, .pt) are not "
            "read: save the model again with safe serialization"
        )
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        tensors.update(_read_header(directory / name))
    return dict(sorted(tensors.items()))


def _read_header(file: Path) -> dict[str, StoredTensor]:
    if not file.is_file():
        raise Corrupted(f"{file} is missing although the index names it: copy or download the model again")
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length + 8 > size:
            raise Corrupted(f"{file} is no safetensors file, or cut off: copy or download it again")
        entries = json.loads(opened.read(length))
    tensors = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            raise BadConfig(f"{file}: {name} has dtype {entry['dtype']}; known are {', '.join(DTYPES)}")
        if 8 + length + end > size:
            raise Corrupted(f"{file} is cut off within {name}: copy or download it again")
        tensors[name] = StoredTensor(file, 8 + length + start, DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return tensors
