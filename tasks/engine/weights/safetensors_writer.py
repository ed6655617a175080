"""Effective weights written to a safetensors file chunk by chunk, so that no whole model is in memory."""

import json
import math
from pathlib import Path

import torch

from tasks.engine.weights.effective import Weight
from tasks.engine.weights.safetensors_reader import DTYPES


def write_safetensors(path: Path, weights: list[Weight], metadata: dict[str, str]) -> None:
    """Writes `weights` into one file; the bytes depend on names and values alone."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for weight in weights:
        start, end = end, end + math.prod(weight.shape) * weight.dtype.itemsize
        header[weight.name] = {"dtype": names[weight.dtype], "shape": weight.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight in weights:
            for chunk in weight.chunks():
                file.write(chunk.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
