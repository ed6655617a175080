"""How many rows of a teacher pass are on disk, so that an interrupted pass resumes behind them."""

import json
import time
from pathlib import Path
from typing import Any

from tasks.distill.teacher_cache.cache_files import sync

SECONDS_BETWEEN_MARKS = 10.0
MARKER = "mark.json"


class ProgressMarker:
    """Marker file of a directory: the `work` that its files belong to and how many rows are written.

    A directory of other work is emptied.
    """

    def __init__(self, directory: Path, work: dict[str, Any]) -> None:
        self.directory, self.path, self.work, self.rows = directory, directory / MARKER, work, 0
        self.last_mark = time.monotonic()
        if self.path.is_file() and (content := json.loads(self.path.read_text()))["work"] == work:
            self.rows = int(content["done"])
        else:
            for path in directory.iterdir():
                path.unlink()

    def mark_periodically(self, rows: int) -> None:
        """Marks `rows` every few seconds."""
        if time.monotonic() - self.last_mark > SECONDS_BETWEEN_MARKS:
            self.mark(rows)

    def mark(self, rows: int) -> None:
        """Marks that `rows` are written, after they are flushed to disk."""
        sync(self.directory)
        temporary = self.directory / "mark.tmp"
        temporary.write_text(json.dumps({"work": self.work, "done": rows}))
        temporary.replace(self.path)
        self.last_mark = time.monotonic()
