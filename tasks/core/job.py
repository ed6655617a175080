"""Events of a running stage command (metrics, progress, log) as JSON lines, and its orderly stop on SIGTERM.

Events go to `<work>/events.jsonl`, one object a line, flushed at once; the parent (`tasks.core.child_process`) reads
the file and forwards it to MLflow and Prefect. A command run by hand writes the same file and shows a bar on stderr.
"""

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from tasks.core.errors import Preempted
from tasks.core.plain_text import visible


class Job:
    """Scratch directory, events and stop requests of a stage function.

    `work` outlives the process: it is named by the stage's cache key, so that a retry, a new run or a new machine finds
    the checkpoints there. `memory_level` counts the out-of-memory retries so far: at level k a stage divides its batch
    by 2**k, and training follows `tasks.core.memory_fallback`. Of several processes, those with `rank` above 0 write
    events to files that are not forwarded.
    """

    def __init__(self, work: Path, memory_level: int = 0, bar: bool = False, rank: int = 0) -> None:
        self.work = work
        self.memory_level = memory_level
        self.stop_requested = False
        self._deferred = False
        self._bar = bar and rank == 0
        work.mkdir(parents=True, exist_ok=True)
        name = "events.jsonl" if rank == 0 else f"events-{rank}.jsonl"
        self._events = (work / name).open("a", encoding="utf-8")

    def _emit(self, event: str, **values: Any) -> None:
        self._events.write(json.dumps({"event": event, "time": time.time(), **values}) + "\n")
        self._events.flush()

    def metrics(self, step: int, **values: float) -> None:
        """Reports numbers at a step (loss, learning_rate, grad_norm, tokens_per_second ...) for MLflow."""
        self._emit("metrics", step=step, values={name: float(value) for name, value in values.items()})

    def tags(self, **values: str) -> None:
        """Reports facts about this try (memory fallback level, memory plan) as tags of the stage's MLflow run."""
        self._emit("tags", values=values)

    def progress(self, completed: float, total: float, unit: str, note: str = "") -> None:
        """Reports progress: `completed` of `total` `unit`s; `note` is shown behind the bar (loss, ETA ...)."""
        self._emit("progress", done=completed, total=total, unit=unit, note=note)
        if self._bar:
            end = "\n" if completed >= total else ""
            print(f"\r{completed:.0f}/{total:.0f} {unit} {visible(note)}\033[K", end=end, file=sys.stderr, flush=True)

    def log(self, message: str, level: str = "info") -> None:
        """Reports a line for a person; `level` is `info` or `warning`."""
        self._emit("log", level=level, message=message)
        if self._bar:
            print(visible(message), file=sys.stderr, flush=True)

    def catch_sigterm(self) -> None:
        """Makes SIGTERM raise `Preempted`, at once or at the end of a `defer_stop` block."""
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        first, self.stop_requested = not self.stop_requested, True
        if first and not self._deferred:  # a second one must not interrupt the clean-up
            raise Preempted("stopped by SIGTERM; run the same command again to go on")

    @contextmanager
    def defer_stop(self) -> Iterator[None]:
        """Delays `Preempted` to the end of the block, so that a training loop can save a checkpoint first."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.stop_requested:
            raise Preempted("stopped by SIGTERM at a checkpoint; run the same command again to go on")
