"""Rows of a JSON array, read piece by piece: one element is in memory at a time, however long the array is."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tasks.ingest.json_lines import line_rows
from tasks.ingest.source_files import BOM, SourceRow, UnreadableRow, open_file, refuse_utf16

PIECE_BYTES = 1 << 20
MAX_ELEMENT = 64 << 20  # characters; a longer element counts as broken
HEAD_BYTES = 4096
GAP = re.compile(r"[\s,]*")


def array_rows(path: Path, name: str) -> Iterator[SourceRow]:
    """Elements of a JSON array, or (one object, JSONL by another name) lines; a line number is the element's first."""
    with open_file(path) as file:
        head = file.read(HEAD_BYTES)
    refuse_utf16(head, name)
    start = head.removeprefix(BOM).lstrip()
    if start.startswith(b"["):
        with open_file(path) as file:
            yield from _elements(_TextWindow(file))
    elif start.startswith(b"{") and start[1:].lstrip(b" \t").startswith((b"\n", b"\r")):
        yield from _single_object(path)
    else:
        yield from line_rows(path, name)


def _single_object(path: Path) -> Iterator[SourceRow]:
    """A single object over several lines; `{"data": [...]}` and the like are its list."""
    with open_file(path) as file:
        data = file.read(MAX_ELEMENT).removeprefix(BOM)
    try:
        value = json.loads(data)
    except ValueError as error:
        reason = f"not JSON: {error}; give one object a line (JSONL), or an array of objects"
        yield 1, UnreadableRow(reason, data[:200].decode(errors="backslashreplace"))
        return
    lists = [field for field in value.values() if isinstance(field, list) and field and isinstance(field[0], dict)]
    if len(value) == 1 and lists:
        yield from ((number, row) for number, row in enumerate(lists[0], start=1))
    else:
        yield 1, value


class _TextWindow:
    """The file's text from the end of the last element on; bytes that are not UTF-8 become lone surrogates."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._decoder = file, codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.position, self.line, self.ended = "", 0, 1, False

    def move(self, position: int) -> None:
        """Moves to a position of `text`, and counts its lines."""
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def extend(self) -> None:
        """Drops the text before the position, and reads another piece of the file."""
        piece = self._file.read(PIECE_BYTES)
        self.ended = not piece
        self.text = self.text[self.position :] + self._decoder.decode(piece, self.ended)
        self.position = 0


def _elements(window: _TextWindow) -> Iterator[SourceRow]:
    decoder = json.JSONDecoder()
    window.extend()
    window.move(window.text.index("[") + 1)
    while True:
        window.move(GAP.match(window.text, window.position).end())  # type: ignore[union-attr]  # matches the empty string
        if window.text.startswith("]", window.position):
            return
        try:
            _, end = decoder.raw_decode(window.text, window.position)
            is_complete = window.ended or bool(
                window.text[end:].lstrip()
            )  # else a number may continue in the next piece
        except ValueError as error:
            if window.ended or len(window.text) - window.position > MAX_ELEMENT:
                yield window.line, _broken_element(window, error)
                return
            is_complete = False
        if is_complete:
            # Line breaks outside of strings are spaces, and inside of them there are none.
            element = window.text[window.position : end].replace("\n", " ")
            yield window.line, element.encode(errors="surrogateescape")
            window.move(end)
        else:
            window.extend()


def _broken_element(window: _TextWindow, error: ValueError) -> UnreadableRow:
    is_open = window.position >= len(window.text)
    message = "the array is not closed" if is_open else str(error).partition(" (")[0]
    raw = window.text[window.position : window.position + 200].encode(errors="surrogateescape")
    reason = f"not JSON, nor is what follows in this array: {message}"
    return UnreadableRow(reason, raw.decode(errors="backslashreplace"))
