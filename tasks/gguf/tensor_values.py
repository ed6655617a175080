"""A tensor's values where they lie (a safetensors file, a GGUF) or as the converter computed them, in pieces."""

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tasks.core.errors import Corrupted
from tasks.engine.runtimes.ggml import Bytes, Floats, to_floats
from tasks.engine.runtimes.ggml_types import TYPES

PIECE = 1 << 20
"""Values in a piece: 4 MiB in float32, for each thread."""


class Place(NamedTuple):
    """Rows that begin `offset` bytes into `file`, as `type`; zero rows follow them where the tensor has more."""

    file: Path
    offset: int
    type: str
    rows: int


class Source(NamedTuple):
    """A tensor before quantization: `type` is what the 16- or 32-bit GGUF has, `shape` with the row length first.

    Its values are at `place`, or `computed` in float32.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    place: Place | None
    computed: Floats | None = None

    @property
    def row(self) -> int:
        """Values a row."""
        return self.shape[0]

    @property
    def rows(self) -> int:
        """Rows of all its matrices."""
        return prod(self.shape[1:])

    @property
    def matrices(self) -> int:
        """How many matrices: 1, or the experts of a layer."""
        return prod(self.shape[2:])

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows in order; none spans two matrices."""
        height = self.rows // self.matrices
        step = max(1, PIECE // self.row)
        for first in range(0, self.rows, height):
            for start in range(first, first + height, step):
                yield start, min(start + step, first + height)

    def as_stored(self, type_: str) -> Iterator[Bytes] | None:
        """Its bytes, when they already lie somewhere as those of `type_`."""
        if self.place is None or self.place.type != type_ or self.place.rows != self.rows:
            return None
        return self._raw(self.place)

    def _raw(self, place: Place) -> Iterator[Bytes]:
        size, piece = self.row * TYPES[place.type].bytes * self.rows, 4 * PIECE
        for start in range(0, size, piece):
            yield _read(place.file, place.offset + start, min(piece, size - start))

    def floats(self, start: int, stop: int) -> Floats:
        """Rows of all matrices in float32 [stop - start, row length]; any thread may ask."""
        if self.computed is not None:
            return self.computed.reshape(-1, self.row)[start:stop]
        assert self.place is not None
        width, stored = self.row * TYPES[self.place.type].bytes, min(stop, self.place.rows)
        data = _read(self.place.file, self.place.offset + start * width, max(0, stored - start) * width)
        rows = to_floats(data, self.place.type).reshape(-1, self.row)
        missing = stop - start - len(rows)
        return np.concatenate([rows, np.zeros((missing, self.row), np.float32)]) if missing else rows


def _read(file: Path, offset: int, size: int) -> Bytes:
    """Read, not mapped: a mapped file counts as resident memory."""
    data = np.fromfile(file, np.uint8, size, offset=offset)
    if len(data) != size:
        raise Corrupted(f"{file} ends within a tensor: copy or download it again")
    return data
