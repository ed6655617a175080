"""Groups of almost equal questions: MinHash over 5-byte shingles, LSH bands, each candidate checked on signatures.

rensa makes the signatures (Fast Similarity Sketching, arXiv 1704.04370). They and their bands are kept on disk and
read band by band, so that memory is about 30 bytes a row and time grows with the rows, not with their pairs.
"""

import mmap
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import orjson
import rensa
from numpy.typing import NDArray

from tasks.ingest.comparison import comparable

PERMUTATIONS = 64
BANDS, BAND_ROWS = 12, 5  # a pair of similarity 0.8 shares a band with probability 0.99, one of 0.5 with 0.32
BATCH = 10_000
SHINGLE_BYTES = 5
WINDOW_BYTES = 8  # of a 64-bit integer, of which the shingle is the low part

Hashes = NDArray[np.uint64]


def near_groups(lines: Iterable[bytes], count: int, threshold: float, work: Path) -> NDArray[np.int64]:
    """The first row of the group of each of `count` rows: the row itself, or the first with an almost equal question.

    Questions of canonical `lines` are in a group when their Jaccard similarity is `threshold` or more; groups are
    transitive.
    """
    work.mkdir(parents=True, exist_ok=True)
    bands = [work / f"band{band}" for band in range(BANDS)]
    signatures = work / "signatures"
    _write_signatures(iter(lines), bands, signatures)
    parent = np.arange(count, dtype=np.int64)
    for band in bands:
        hashes = np.fromfile(band, dtype=np.uint64)
        for left, right in _candidates(hashes):
            _union_similar(parent, left, right, signatures, threshold)
        band.unlink()
    signatures.unlink()
    return _roots(parent)


def question_text(line: bytes) -> bytes:
    """The text that is compared: messages before the answer but the system's, as rows are compared."""
    messages = orjson.loads(line)["messages"]
    text = "\n".join(message["content"] for message in messages[:-1] if message["role"] != "system")
    return comparable(text).encode()


def _write_signatures(lines: Iterator[bytes], bands: list[Path], signatures: Path) -> None:
    """Writes 16 bits of each of a row's minima to `signatures`, and a hash of each band's minima to its file."""
    files = [band.open("wb") for band in bands]
    try:
        with signatures.open("wb") as out:
            while batch := list(islice(lines, BATCH)):
                minima = _minima([question_text(line) for line in batch])
                out.write(minima.astype(np.uint16).tobytes())
                for band, file in enumerate(files):
                    file.write(_band_hashes(minima[:, band * BAND_ROWS : (band + 1) * BAND_ROWS]).tobytes())
    finally:
        for file in files:
            file.close()


def _minima(texts: list[bytes]) -> NDArray[np.uint32]:
    """(rows, PERMUTATIONS) minima over all shingles of each text; a shorter text is one shingle."""
    padded = [text.ljust(SHINGLE_BYTES, b"\0") for text in texts]
    ends = np.cumsum([len(text) for text in padded])
    joined = np.frombuffer(b"".join([*padded, bytes(WINDOW_BYTES - SHINGLE_BYTES)]), dtype=np.uint8)
    windows = np.ndarray((len(joined) - WINDOW_BYTES + 1,), np.dtype("<u8"), joined, strides=(1,))
    shingles = windows & np.uint64((1 << 8 * SHINGLE_BYTES) - 1)
    inside = np.ones(len(shingles), dtype=bool)
    for back in range(1, SHINGLE_BYTES):  # shingles that reach over the end of a text
        inside[ends[:-1] - back] = False
    counts = np.diff(ends, prepend=0) - SHINGLE_BYTES + 1
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        _splitmix64(shingles[inside]), offsets, PERMUTATIONS, 0
    )
    return np.array(matrix.to_rows(), dtype=np.uint32).reshape(len(texts), PERMUTATIONS)


def _splitmix64(values: Hashes) -> Hashes:
    """splitmix64's finalizer: every input bit changes half of the output's."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _band_hashes(minima: NDArray[np.uint32]) -> Hashes:
    """A hash of each row's minima in a band."""
    hashes = np.zeros(len(minima), dtype=np.uint64)
    for column in minima.T:
        hashes = _splitmix64(hashes + np.uint64(0x9E3779B97F4A7C15) + column)
    return hashes


def _candidates(hashes: Hashes) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs of rows with an equal hash: each with the first of them, and each with the one before it."""
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]]) + 1
    if not len(same):
        return
    starts = np.ones(len(same), dtype=bool)
    starts[1:] = np.diff(same) > 1
    first = same[starts][np.cumsum(starts) - 1] - 1
    yield order[first], order[same]
    has_another_before = first != same - 1
    yield order[same[has_another_before] - 1], order[same[has_another_before]]


def _union_similar(
    parent: NDArray[np.int64], left: NDArray[np.int64], right: NDArray[np.int64], signatures: Path, threshold: float
) -> None:
    """Joins the groups of the pairs whose signatures are similar (union-find on `parent`)."""
    roots = _roots(parent)
    distinct = roots[left] != roots[right]
    left, right = left[distinct], right[distinct]
    if not len(left):
        return
    with signatures.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        for start in range(0, len(left), BATCH):
            first, second = left[start : start + BATCH], right[start : start + BATCH]
            table = np.frombuffer(view, dtype=np.uint16).reshape(-1, PERMUTATIONS)
            similar = (table[first] == table[second]).mean(axis=1) >= threshold
            del table
            view.madvise(mmap.MADV_DONTNEED)  # pages that were read would count as this process's memory
            for a, b in zip(first[similar].tolist(), second[similar].tolist(), strict=True):
                a, b = _root(parent, a), _root(parent, b)
                parent[max(a, b)] = min(a, b)


def _root(parent: NDArray[np.int64], row: int) -> int:
    while parent[row] != row:
        parent[row] = parent[parent[row]]
        row = int(parent[row])
    return row


def _roots(parent: NDArray[np.int64]) -> NDArray[np.int64]:
    """Every row's root, for all rows at once by halving the paths."""
    roots = parent
    while True:
        grandparents = roots[roots]
        if (grandparents == roots).all():
            return grandparents
        roots = grandparents
