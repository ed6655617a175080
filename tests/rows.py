"""Canonical rows written to a file, as the ingest stage leaves them."""

import json
from collections.abc import Iterable
from pathlib import Path

from tasks.core.rows import Row


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes rows, one a line."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            excluded = {"labels"} if row.labels is None else None
            file.write(json.dumps(row.model_dump(exclude=excluded), ensure_ascii=False) + "\n")
