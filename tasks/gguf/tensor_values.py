"""A tensor's values in pieces, read from the file that stores them or computed by llama.cpp's converter."""

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tasks.core.errors import Corrupted
from tasks.engine.runtimes.ggml import Bytes, Floats, to_floats
from tasks.engine.runtimes.ggml_types import TYPES

PIECE = 1 << 20
"""Values per piece: 4 MiB in float32 for each thread."""


class StoredRows(NamedTuple):
    """Rows of `type`, `offset` bytes into `file`; a tensor with more rows has zeros behind them."""

    file: Path
    offset: int
    type: str
    rows: int


class SourceTensor(NamedTuple):
    """A tensor before quantization: its 16- or 32-bit `type`, and `shape` with the row length first.

    Its values are `stored` in a file, or `computed` in float32.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    stored: StoredRows | None
    computed: Floats | None = None

    @property
    def row(self) -> int:
        """Values per row."""
        return self.shape[0]

    @property
    def rows(self) -> int:
        """Rows of all matrices together."""
        return prod(self.shape[1:])

    @property
    def matrices(self) -> int:
        """Number of matrices: 1, or the experts of a layer."""
        return prod(self.shape[2:])

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Consecutive ranges of rows, none across two matrices."""
        height = self.rows // self.matrices
        step = max(1, PIECE // self.row)
        for first in range(0, self.rows, height):
            for start in range(first, first + height, step):
                yield start, min(start + step, first + height)

    def as_stored(self, type_: str) -> Iterator[Bytes] | None:
        """The stored bytes where they already are those of `type_`, else None."""
        if self.stored is None or self.stored.type != type_ or self.stored.rows != self.rows:
            return None
        return self._raw(self.stored)

    def _raw(self, stored: StoredRows) -> Iterator[Bytes]:
        size, piece = self.row * TYPES[stored.type].bytes * self.rows, 4 * PIECE
        for start in range(0, size, piece):
            yield _read(stored.file, stored.offset + start, min(piece, size - start))

    def floats(self, start: int, stop: int) -> Floats:
        """A range of rows in float32 [stop - start, row length]; thread-safe."""
        if self.computed is not None:
            return self.computed.reshape(-1, self.row)[start:stop]
        assert self.stored is not None
        width, stored_stop = self.row * TYPES[self.stored.type].bytes, min(stop, self.stored.rows)
        data = _read(self.stored.file, self.stored.offset + start * width, max(0, stored_stop - start) * width)
        rows = to_floats(data, self.stored.type).reshape(-1, self.row)
        missing = stop - start - len(rows)
        return np.concatenate([rows, np.zeros((missing, self.row), np.float32)]) if missing else rows


def _read(file: Path, offset: int, size: int) -> Bytes:
    """Bytes of a file, read instead of mapped: mapped pages count as resident memory."""
    data = np.fromfile(file, np.uint8, size, offset=offset)
    if len(data) != size:
        raise Corrupted(f"{file} ends within a tensor: copy or download it again")
    return data
