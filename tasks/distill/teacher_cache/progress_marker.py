"""How far the teacher's pass over the rows has come: marked on the disk, so that a later try goes on from there."""

import json
import time
from pathlib import Path
from typing import Any

from tasks.distill.teacher_cache.hidden_states import sync

SECONDS_BETWEEN_MARKS = 10.0


class Mark:
    """How many rows are on the disk, for a later try of the same work."""

    def __init__(self, directory: Path, work: dict[str, Any]) -> None:
        self.directory, self.path, self.work, self.done = directory, directory / "mark.json", work, 0
        self.at = time.monotonic()
        if self.path.is_file() and (read := json.loads(self.path.read_text()))["work"] == work:
            self.done = int(read["done"])
        else:
            for path in directory.iterdir():
                path.unlink()

    def maybe(self, done: int) -> None:
        """Marks `done` rows every few seconds."""
        if time.monotonic() - self.at > SECONDS_BETWEEN_MARKS:
            self.set(done)

    def set(self, done: int) -> None:
        """Marks `done` rows; they are on the disk before the mark says so."""
        sync(self.directory)
        temporary = self.directory / "mark.tmp"
        temporary.write_text(json.dumps({"work": self.work, "done": done}))
        temporary.replace(self.path)
        self.at = time.monotonic()
