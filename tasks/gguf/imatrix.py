"""Reads llama.cpp's importance matrix (GGUF, tools/imatrix): mean squared inputs per column of each matrix.

For a matrix `name` the file has `name.in_sum2`, sums of squared inputs by column, and `name.counts`, rows summed over.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from tasks.core.errors import BadConfig
from tasks.engine.runtimes.ggml import Floats
from tasks.gguf.header import Header, TensorInfo, pack_text, pack_uint32, read_header

IMATRIX_FILE = "imatrix.gguf"


class Imatrix(NamedTuple):
    """Mean squared inputs by tensor name, flat [matrices * row length], with the file's datasets and chunks."""

    weights: dict[str, Floats]
    datasets: list[str]
    chunks: int

    def values(self) -> dict[str, bytes]:
        """The metadata values that llama-quantize writes into a file quantized with it."""
        values = {"quantize.imatrix.file": pack_text(IMATRIX_FILE)}
        if self.datasets:
            values["quantize.imatrix.dataset"] = pack_text(self.datasets[0])
        values["quantize.imatrix.entries_count"] = pack_uint32(len(self.weights))
        return values | ({"quantize.imatrix.chunks_count": pack_uint32(self.chunks)} if self.chunks else {})

    def for_tensor(self, name: str, row: int, matrices: int, embedding: bool) -> Floats | None:
        """Weights [matrices, row] of a tensor, or None. Raises BadConfig for weights of another width."""
        weights = self.weights.get(name)
        if weights is None or (embedding and weights.size != row * matrices):
            return None
        if weights.size != row * matrices:
            raise BadConfig(
                f"the importance matrix has {weights.size} values for {name}, whose rows have {row}: it was made with "
                "another model; run the outliers stage on this one"
            )
        return weights.reshape(matrices, row)


def read_imatrix(file: Path) -> Imatrix:
    """Reads a file. Raises BadConfig for one that is no importance matrix, or whose values are not finite."""
    header = read_header(file)
    tensors = {tensor.name: tensor for tensor in header.tensors}
    names = sorted(name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2"))
    if not names:
        raise BadConfig(f"{file} is no importance matrix: it has no tensor that ends in .in_sum2")
    weights = {}
    for name in names:
        if f"{name}.counts" not in tensors:
            raise BadConfig(f"{file} has sums but no counts for {name}: run the outliers stage again")
        sums, counts = (_floats(file, tensors[f"{name}.{part}"]) for part in ("in_sum2", "counts"))
        sums, counts = sums.reshape(len(counts), -1), np.rint(counts)[:, None]
        means = np.where(counts > 0, sums / np.maximum(counts, 1), 1).astype(np.float32)
        if not np.isfinite(means).all():
            raise BadConfig(f"{file}: the importance of {name} is not finite, so the model's activations were not")
        weights[name] = means.reshape(-1)
    return Imatrix(weights, _texts(header), int(header.get("imatrix.chunk_count", 0)))


def _floats(file: Path, tensor: TensorInfo) -> Floats:
    if tensor.type != "F32":
        raise BadConfig(f"{file}: {tensor.name} is {tensor.type}; sums and counts have to be F32")
    return np.fromfile(file, np.float32, tensor.bytes // 4, offset=tensor.offset)


def _texts(header: Header) -> list[str]:
    return [str(text) for text in header.get("imatrix.datasets", [])]
