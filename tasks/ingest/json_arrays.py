"""Rows of a JSON array, read piece by piece: one element is in memory at a time, however long the array is."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tasks.ingest.read import Numbered, Unreadable, lines, opened, refuse_utf16

PIECE = 1 << 20
LONGEST = 64 << 20  # characters of one element; a longer one is taken for broken
GAP = re.compile(r"[\s,]*")


def rows(path: Path, name: str) -> Iterator[Numbered]:
    """Elements of a JSON array, or (one object, JSONL by another name) lines; a line number is the element's first."""
    with opened(path) as file:
        head = file.read(4096)
    refuse_utf16(head, name)
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
        with opened(path) as file:
            yield from _elements(_Text(file))
    elif start.startswith(b"{") and start[1:].lstrip(b" \t").startswith((b"\n", b"\r")):
        yield from _one_object(path)
    else:
        yield from lines(path, name)


def _one_object(path: Path) -> Iterator[Numbered]:
    """A single object over several lines; `{"data": [...]}` and the like are its list."""
    with opened(path) as file:
        data = file.read(LONGEST).removeprefix(b"\xef\xbb\xbf")
    try:
        value = json.loads(data)
    except ValueError as error:
        reason = f"not JSON: {error}; give one object a line (JSONL), or an array of objects"
        yield 1, Unreadable(reason, data[:200].decode(errors="backslashreplace"))
        return
    lists = [one for one in value.values() if isinstance(one, list) and one and isinstance(one[0], dict)]
    if len(value) == 1 and lists:
        yield from ((number, row) for number, row in enumerate(lists[0], start=1))
    else:
        yield 1, value


class _Text:
    """The file's text from where the last element ended; bytes that are not UTF-8 become lone surrogates."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._decoder = file, codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.position, self.line, self.ended = "", 0, 1, False

    def move(self, position: int) -> None:
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def more(self) -> None:
        piece = self._file.read(PIECE)
        self.ended = not piece
        self.text = self.text[self.position :] + self._decoder.decode(piece, self.ended)
        self.position = 0


def _elements(text: _Text) -> Iterator[Numbered]:
    decoder = json.JSONDecoder()
    text.more()
    text.move(text.text.index("[") + 1)
    while True:
        text.move(GAP.match(text.text, text.position).end())  # type: ignore[union-attr]  # matches the empty string
        if text.text.startswith("]", text.position):
            return
        try:
            _, end = decoder.raw_decode(text.text, text.position)
            whole = text.ended or bool(text.text[end:].lstrip())  # else a number may go on in the next piece
        except ValueError as error:
            if text.ended or len(text.text) - text.position > LONGEST:
                what = "the array is not closed" if text.position >= len(text.text) else str(error).partition(" (")[0]
                raw = text.text[text.position : text.position + 200].encode(errors="surrogateescape")
                reason = f"not JSON, nor is what follows in this array: {what}"
                yield text.line, Unreadable(reason, raw.decode(errors="backslashreplace"))
                return
            whole = False
        if whole:
            # Line breaks outside of strings are spaces, and inside of them there are none.
            yield text.line, text.text[text.position : end].replace("\n", " ").encode(errors="surrogateescape")
            text.move(end)
        else:
            text.more()
