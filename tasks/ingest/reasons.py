"""Reasons, in words, why rows that could be parsed are quarantined."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import orjson
import polars as pl

from tasks.ingest.first_pass import ParsedRows

FAULTS = (
    "",
    "not_json",
    "schema",
    "over_long",
    "leak",
    "conversation_leak",
    "group_leak",
    "duplicate",
    "near_duplicate",
    "conflict",
)


class FaultDetails(NamedTuple):
    """`faults` has row, fault, other; the reasons of schema faults are by kind of answer, token counts by row."""

    faults: pl.DataFrame
    schema_reasons: Mapping[int, str]
    tokens: Mapping[int, int]
    max_length: int


class QuarantineReasons:
    """The reason by a row's number; five bytes a row beside the first pass's columns, which are not copied."""

    def __init__(self, parsed: ParsedRows, details: FaultDetails, splits: pl.DataFrame) -> None:
        self._files, self._details = parsed.files, details
        columns = (parsed.rows[name].to_numpy() for name in ("file", "line", "kind", "question", "written"))
        self._file, self._line, self._kind, self._question, self._written = columns
        self._fault = np.zeros(parsed.rows.height, dtype=np.uint8)
        self._other = np.zeros(parsed.rows.height, dtype=np.uint32)
        rows = details.faults["row"].to_numpy()
        codes = {name: code for code, name in enumerate(FAULTS)}
        self._fault[rows] = details.faults["fault"].replace_strict(codes, return_dtype=pl.UInt8).to_numpy()
        self._other[rows] = details.faults["other"].fill_null(0).to_numpy()
        leaks = details.faults.filter(pl.col("fault").str.ends_with("leak"))
        self._split = dict(leaks.join(splits, on="row").select("row", "split").iter_rows())

    def __call__(self, row: int) -> str:
        """The reason why the row is in quarantine."""
        fault, other = FAULTS[self._fault[row]], int(self._other[row])
        if fault == "schema":
            return self._details.schema_reasons[int(self._kind[row])]
        if fault == "over_long":
            return f"{self._details.tokens[row]} tokens, more than max_length={self._details.max_length}"
        if fault == "not_json":
            return "the answer should be a JSON object, as most answers are, and is not"
        location = self.location(other)
        if fault.endswith("leak"):
            return f"{self._leak(fault, row, other)} is held out ({location}), so {self._split[row]} must not hold it"
        return {
            "duplicate": f"duplicate of {location}{self._difference(row, other)}",
            "near_duplicate": f"almost a duplicate of {self.location(other)}: nearly its question, and its answer",
            "conflict": f"the same question has another answer at {self.location(other)}; keep the right one",
        }[fault]

    def _leak(self, fault: str, row: int, other: int) -> str:
        if fault == "conversation_leak":
            return "a conversation that this one begins, or goes on from,"
        if fault == "group_leak":
            return "its group (group_by)"
        if self._question[row] != self._question[other]:
            return "almost the same question"
        return f"the same question{self._difference(row, other)}"

    def _difference(self, row: int, other: int) -> str:
        """Says that two questions that are compared as equal are not written alike."""
        alike = self._written[row] == self._written[other]
        return "" if alike else ", but for case, white space, Unicode form or invisible characters,"

    def location(self, row: int) -> str:
        """File and line of a row."""
        return f"{self._files[self._file[row]][0]}:{self._line[row]}"

    def quarantine_line(self, row: int, line: bytes) -> bytes:
        """The row's line of quarantine.jsonl, with its canonical line as `raw`."""
        file, number = self._files[self._file[row]][0], int(self._line[row])
        return orjson.dumps({"file": file, "line": number, "reason": self(row), "raw": line.decode()}) + b"\n"
