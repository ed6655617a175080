"""Rows of a JSONL file, in blocks of whole lines or one by one."""

from collections.abc import Iterator
from pathlib import Path

from tasks.ingest.source_files import BOM, SourceRow, file_errors, file_format, open_file, refuse_utf16

BLOCK_BYTES = 1 << 18


def is_json_lines(path: Path) -> bool:
    """Whether rows are lines by the file's name, so that `line_blocks` reads it."""
    return file_format(path) in (".jsonl", ".ndjson")


def line_rows(path: Path, name: str) -> Iterator[SourceRow]:
    """JSON lines; empty ones do not count as rows."""
    for first_line, _, block in line_blocks(path, name, BLOCK_BYTES):
        for number, line in enumerate(block.split(b"\n"), first_line):
            if line and not line.isspace():
                yield number, line


def line_blocks(path: Path, name: str, size: int) -> Iterator[tuple[int, int, bytes]]:
    """Blocks of whole lines of about `size` bytes: the number of the first line, the offset in the file, the bytes."""
    first_line, offset = 1, 0
    with file_errors(path, name), open_file(path) as file:
        while block := file.read(size):
            block += file.readline()
            if first_line == 1:
                refuse_utf16(block, name)
                offset = len(BOM) if block.startswith(BOM) else 0
                block = block[offset:]
            yield first_line, offset, block
            first_line += block.count(b"\n")
            offset += len(block)
