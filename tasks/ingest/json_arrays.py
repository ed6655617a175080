"""Rows of JSON that is not one object a line: arrays, `{"data": [...]}`, objects over several lines, one after another.

The text is read piece by piece, and cut into elements by its quotes and brackets alone; what is between them is parsed
later. So a broken element is one row of the quarantine, and one element is in memory at a time.
"""

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import orjson

from tasks.ingest.json_lines import line_rows
from tasks.ingest.row_shapes import SHAPES
from tasks.ingest.source_files import (
    BOM,
    LIMITS,
    ReadLimits,
    SourceRow,
    UnreadableRow,
    file_errors,
    open_file,
    refuse_utf16,
)

PIECE_BYTES = 1 << 20
BROKEN = -1  # in place of a position
HEAD_BYTES = 1 << 16
MAX_HEAD_LINES = 50
WRAPPERS = ("data", "rows", "examples", "items", "records", "instances", "train")
STRING = r'"[^"\\\n]*+(?:\\.[^"\\\n]*+)*+"'
GAP = re.compile(r"[\s,\ufeff]*+")
FLAT_OBJECT = re.compile(rf'\{{(?:[^"\[\]{{}}]++|{STRING})*+\}}')
TOKEN = re.compile(rf'[^"\[\]{{}}]*+({STRING}|["\[\]{{}}])')
SCALAR_END = re.compile(r"[,\]\}\n]")
FIRST_KEY = re.compile(rf"\{{\s*+({STRING})\s*+:")
FIELD = re.compile(rf"{STRING}\s*+:\s*+")
CR_LINES = re.compile(r"[}\],]\r\s*[{\[]")  # lines that end as on old Macs
ANY_OBJECT = re.compile(rf"[,\n]\s*+(\{{\s*+{STRING}\s*+:)")
WRAPPER = re.compile(rf"\{{\s*+({STRING})\s*+:\s*+\[\s*+(?=\{{)")


def is_json_lines(path: Path, name: str, limits: ReadLimits = LIMITS) -> bool:
    """Whether a JSON file has one object a line, by its first lines."""
    with file_errors(path, name), open_file(path, name, limits) as file:
        head = file.read(HEAD_BYTES)
    refuse_utf16(head, name)
    text = head.removeprefix(BOM).decode(errors="replace").lstrip()
    if text.startswith("[") or ("\n" not in text and CR_LINES.search(text)):
        return False
    if not text.startswith("{"):
        return True
    if _opens_wrapper(text):
        return False
    line, _, following = text.partition("\n")
    if not following.strip() or _end(line, 0) is not None or not _is_open(line):
        return True
    if not line.rstrip().endswith(("{", "[", ",")):
        return True
    lines = [following.lstrip().partition("\n")[0], *following.splitlines()[:MAX_HEAD_LINES]]
    return any(FIRST_KEY.match(text) and _end(text, 0) == len(text.rstrip()) for text in lines)  # the first is cut off


def json_rows(path: Path, name: str, limits: ReadLimits = LIMITS) -> Iterator[SourceRow]:
    """Rows of a JSON file of any layout; a row's number is its first line."""
    if is_json_lines(path, name, limits):
        yield from line_rows(path, name, limits)
    else:
        with open_file(path, name, limits) as file:
            yield from _elements(_TextWindow(file), limits)


class _TextWindow:
    """The file's text from the end of the last element on; bytes that are not UTF-8 become lone surrogates."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._decoder = file, codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.position, self.line, self.ended = "", 0, 1, False
        self.extend()
        self._line_break = "\n" if "\n" in self.text else "\r"

    def move(self, position: int) -> None:
        """Moves to a position of `text`, and counts its lines."""
        self.line += self.text.count(self._line_break, self.position, position)
        self.position = position

    def extend(self) -> None:
        """Drops the text before the position, and reads another piece of the file, at least as long as the rest."""
        rest = self.text[self.position :]
        piece = self._file.read(max(PIECE_BYTES, len(rest)))
        self.ended = not piece
        self.text, self.position = rest + self._decoder.decode(piece, self.ended), 0

    def skip_gap(self) -> str:
        """Moves behind spaces and commas, and returns the character there; empty at the file's end."""
        while True:
            self.move(GAP.match(self.text, self.position).end())  # type: ignore[union-attr]  # matches the empty string
            if self.position < len(self.text) or self.ended:
                return self.text[self.position : self.position + 1]
            self.extend()

    def taken(self, end: int) -> bytes:
        """The bytes up to `end`, to which it moves."""
        data = self.text[self.position : end].encode(errors="surrogateescape")
        self.move(end)
        return data


class _Element(NamedTuple):
    """Where an element ends, and whether its quotes and brackets are closed there."""

    end: int
    is_closed: bool


def _elements(window: _TextWindow, limits: ReadLimits) -> Iterator[SourceRow]:
    depth, wrapper, opening, is_cut = 0, "", ANY_OBJECT, False  # depth 1: inside an array of rows
    while True:
        character = window.skip_gap()
        if not character:
            if depth and not is_cut:
                yield window.line, UnreadableRow("not JSON: the array is not closed; was the file cut?", "")
            return
        if depth and character == "]":
            window.move(window.position + 1)
            depth = 0
            if wrapper:
                yield from _behind_wrapper(window, wrapper, limits)
                wrapper = ""
            continue
        if not depth and character == "[":
            window.move(window.position + 1)
            depth = 1
            continue
        if not depth and character == "{":
            _complete(window, opening, limits)
            if match := _opens_wrapper(window.text[window.position :]):
                depth, wrapper = 1, match[1]
                window.move(window.position + match.end())
                continue
        line, element = window.line, _complete(window, opening, limits)
        if opening is ANY_OBJECT and element.is_closed:
            opening = _opening_like(window.text[window.position : element.end])
        is_cut = not element.is_closed
        if element.end - window.position > limits.row_bytes:
            yield line, UnreadableRow(limits.too_long(), window.text[window.position : window.position + 200])
            window.move(element.end)
        elif element.is_closed:
            yield line, window.taken(element.end).replace(b"\n", b" ").replace(b"\r", b" ")
        else:
            yield line, window.taken(element.end).rstrip(b", \t\r\n")


def _complete(window: _TextWindow, opening: re.Pattern[str], limits: ReadLimits) -> _Element:
    """The element at the position, with as much text read as it takes.

    Where its quotes or brackets are not closed it ends before the next text that looks like an element's beginning.
    """
    while True:
        start = window.position
        end = _end(window.text, start)
        is_enough = window.ended or end is not None and end < len(window.text)  # else a number may continue
        if end is not None and end > 0 and is_enough:
            swallowed = opening.search(window.text, start + 1, end)
            if swallowed is None or _is_json(window.text[start:end]):
                return _Element(end, is_closed=True)
            return _Element(swallowed.start(1), is_closed=False)  # a quote too many hid the brackets between two rows
        is_broken = end == BROKEN or window.ended or len(window.text) - start > limits.row_bytes
        if is_broken:
            following = opening.search(window.text, start + 1) or ANY_OBJECT.search(window.text, start + 1)
            if following or window.ended or len(window.text) - start > limits.row_bytes:
                return _Element(following.start(1) if following else len(window.text), is_closed=False)
        window.extend()


def _opening_like(element: str) -> re.Pattern[str]:
    """How elements begin that have the first key of this one."""
    first = FIRST_KEY.match(element)
    return re.compile(rf"(\{{\s*+{re.escape(first[1])}\s*+:)") if first and _is_json(element) else ANY_OBJECT


def _is_json(text: str) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True


def _end(text: str, start: int) -> int | None:
    """Where the element at `start` ends; None where the text ends first, BROKEN for a string that a line's end cuts."""
    if match := FLAT_OBJECT.match(text, start):
        return match.end()
    if text[start : start + 1] not in ("{", "["):
        quoted = re.compile(STRING).match(text, start)
        end = SCALAR_END.search(text, quoted.end() if quoted else start)
        return max(end.start(), start + 1) if end else None
    depth, position = 0, start
    while match := TOKEN.match(text, position):
        token, position = match[1], match.end()
        if token in "{[":
            depth += 1
        elif token in "}]":
            depth -= 1
            if not depth:
                return position
        elif token == '"':
            return BROKEN if "\n" in text[position:] else None
    return None


def _is_open(line: str) -> bool:
    """Whether an object's first line leaves brackets open, and no string."""
    return _end(line, 0) is None and _end(line + "\n", 0) is None


def _opens_wrapper(text: str) -> "re.Match[str] | None":
    """The beginning of an object whose first field is a list of rows, as in `{"data": [{"question": ...`."""
    match = WRAPPER.match(text)
    if match is None:
        return None
    end = _end(text, match.end())
    if end is None or end == BROKEN:
        return match if match[1].strip('"').lower() in WRAPPERS else None
    element = text[match.end() : end]
    known = any(all(f'"{field}"' in element for field in shape.fields) for shape in SHAPES.values())
    return match if known else None


def _behind_wrapper(window: _TextWindow, name: str, limits: ReadLimits) -> Iterator[SourceRow]:
    """What follows the list in its object: nothing, or fields that are no rows."""
    if window.skip_gap() == "}":
        window.move(window.position + 1)
        return
    line, fields = window.line, ""
    while (character := window.skip_gap()) and character != "}" and len(fields) < limits.row_bytes:
        end = FIELD.match(window.text, window.position)
        if end is None:
            break  # rows again: the list was closed too early
        start = window.position
        window.move(end.end())
        fields += window.text[start : window.position]
        element = _complete(window, ANY_OBJECT, limits)
        fields += window.taken(element.end).decode(errors="backslashreplace") + " "
    if window.text.startswith("}", window.position):
        window.move(window.position + 1)
    if fields:
        yield line, UnreadableRow(f"not read: what follows the list {name} is no row", fields.strip())
