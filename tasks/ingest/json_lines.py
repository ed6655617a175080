"""Rows of a JSONL file, in blocks of whole lines or one by one."""

from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tasks.ingest.source_files import BOM, LIMITS, ReadLimits, SourceRow, file_errors, open_file, refuse_utf16

BLOCK_BYTES = 1 << 18


def line_rows(path: Path, name: str, limits: ReadLimits = LIMITS) -> Iterator[SourceRow]:
    """JSON lines; empty ones do not count as rows."""
    for first_line, _, block in line_blocks(path, name, BLOCK_BYTES, limits):
        for number, line in enumerate(block.split(b"\n"), first_line):
            if line and not line.isspace():
                yield number, line


def line_blocks(path: Path, name: str, size: int, limits: ReadLimits = LIMITS) -> Iterator[tuple[int, int, bytes]]:
    """Blocks of whole lines of about `size` bytes: the number of the first line, the offset in the file, the bytes.

    Of a line longer than the limit a block has the beginning, one byte more than the limit at least.
    """
    first_line, offset = 1, 0
    with file_errors(path, name), open_file(path, name, limits) as file:
        while block := file.read(size):
            skipped = 0
            if not block.endswith(b"\n"):
                block += file.readline(limits.row_bytes + 1)
                skipped = 0 if block.endswith(b"\n") else skip_line(file)
            if first_line == 1:
                refuse_utf16(block, name)
                offset = len(BOM) if block.startswith(BOM) else 0
                block = block[offset:]
            yield first_line, offset, block
            first_line += block.count(b"\n") + bool(skipped)
            offset += len(block) + skipped


def skip_line(file: IO[bytes]) -> int:
    """Reads to the end of the line without keeping it; returns the number of bytes."""
    skipped = 0
    while piece := file.readline(1 << 20):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped
