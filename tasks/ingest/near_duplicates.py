"""Almost equal questions: MinHash over 5-byte pieces, banded (LSH), every candidate pair checked on its signatures.

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

PERMUTATIONS = 64
BANDS, BAND_ROWS = 12, 5  # a pair of similarity 0.8 shares a band with probability 0.99, one of 0.5 with 0.32
BATCH = 10_000
PIECE = 5
WINDOW = 8  # bytes that are read at once, and masked

Hashes = NDArray[np.uint64]


def near_groups(lines: Iterable[bytes], count: int, threshold: float, work: Path) -> NDArray[np.int64]:
    """The first row of each of `count` rows' groups: itself, or the first that asks almost the same.

    Questions of canonical `lines` are together when their similarity is `threshold` or more, also by way of others.
    """
    work.mkdir(parents=True, exist_ok=True)
    bands = [work / f"band{band}" for band in range(BANDS)]
    signatures = work / "signatures"
    _sketch(iter(lines), bands, signatures)
    parent = np.arange(count, dtype=np.int64)
    for band in bands:
        hashes = np.fromfile(band, dtype=np.uint64)
        for left, right in _candidates(hashes):
            _join(parent, left, right, signatures, threshold)
        band.unlink()
    signatures.unlink()
    return _roots(parent)


def question_text(line: bytes) -> bytes:
    """What is compared of a line: messages before the answer but the system's, in small letters and one space."""
    messages = orjson.loads(line)["messages"]
    text = "\n".join(one["content"] for one in messages[:-1] if one["role"] != "system")
    return b" ".join(text.lower().encode().split())


def _sketch(lines: Iterator[bytes], bands: list[Path], signatures: Path) -> None:
    """Writes 16 bits of each of a row's minima to `signatures`, and a hash of each band's minima to its file."""
    files = [band.open("wb") for band in bands]
    try:
        with signatures.open("wb") as out:
            while batch := list(islice(lines, BATCH)):
                minima = _minima([question_text(line) for line in batch])
                out.write(minima.astype(np.uint16).tobytes())
                for band, file in enumerate(files):
                    file.write(_mixed(minima[:, band * BAND_ROWS : (band + 1) * BAND_ROWS]).tobytes())
    finally:
        for file in files:
            file.close()


def _minima(texts: list[bytes]) -> NDArray[np.uint32]:
    """(rows, PERMUTATIONS) minima over all `PIECE`-byte pieces of each text; a shorter text is one piece."""
    padded = [text.ljust(PIECE, b"\0") for text in texts]
    ends = np.cumsum([len(text) for text in padded])
    whole = np.frombuffer(b"".join([*padded, bytes(WINDOW - PIECE)]), dtype=np.uint8)
    windows = np.ndarray((len(whole) - WINDOW + 1,), np.dtype("<u8"), whole, strides=(1,))
    pieces = windows & np.uint64((1 << 8 * PIECE) - 1)
    inside = np.ones(len(pieces), dtype=bool)
    for back in range(1, PIECE):  # pieces that reach over the end of a text
        inside[ends[:-1] - back] = False
    counts = np.diff(ends, prepend=0) - PIECE + 1
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
    hashes = _scrambled(pieces[inside])
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, PERMUTATIONS, 0)
    rows = matrix.to_rows()
    return np.array(rows, dtype=np.uint32).reshape(len(texts), PERMUTATIONS)


def _scrambled(values: Hashes) -> Hashes:
    """splitmix64's finalizer: every input bit changes half of the output's."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _mixed(minima: NDArray[np.uint32]) -> Hashes:
    found = np.zeros(len(minima), dtype=np.uint64)
    for column in minima.T:
        found = _scrambled(found + np.uint64(0x9E3779B97F4A7C15) + column)
    return found


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
    later = first != same - 1
    yield order[same[later] - 1], order[same[later]]


def _join(
    parent: NDArray[np.int64], left: NDArray[np.int64], right: NDArray[np.int64], signatures: Path, threshold: float
) -> None:
    """Joins the groups of those pairs that the signatures confirm."""
    roots = _roots(parent)
    apart = roots[left] != roots[right]
    left, right = left[apart], right[apart]
    if not len(left):
        return
    with signatures.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        for start in range(0, len(left), BATCH):
            one, other = left[start : start + BATCH], right[start : start + BATCH]
            kept = np.frombuffer(view, dtype=np.uint16).reshape(-1, PERMUTATIONS)
            similar = (kept[one] == kept[other]).mean(axis=1) >= threshold
            del kept
            view.madvise(mmap.MADV_DONTNEED)  # or the pages that were read would count as ours
            for a, b in zip(one[similar].tolist(), other[similar].tolist(), strict=True):
                a, b = _root(parent, a), _root(parent, b)
                parent[max(a, b)] = min(a, b)


def _root(parent: NDArray[np.int64], row: int) -> int:
    while parent[row] != row:
        parent[row] = parent[parent[row]]
        row = int(parent[row])
    return row


def _roots(parent: NDArray[np.int64]) -> NDArray[np.int64]:
    """Every row's root, found for all at once by halving the paths."""
    roots = parent
    while True:
        further = roots[roots]
        if (further == roots).all():
            return further
        roots = further
