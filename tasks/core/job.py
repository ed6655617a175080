"""A stage command's way of speaking while it works: events as JSON lines, and polite stopping.

Events go to `<work>/events.jsonl`, one object a line, flushed at once; the parent (`tasks.core.child`) follows the
file and forwards it to MLflow and Prefect. A command run by hand writes the same file and shows a bar on stderr.
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


class Job:
    """What a stage function is given beside its inputs.

    `work` is scratch space that outlives the process: named by the stage's cache key, so that a retry, a new run or
    a new machine finds the checkpoints there. `rung` counts the out-of-memory retries so far: at rung k a stage
    divides its micro-batch by 2**k and multiplies accumulation, its effective batch unchanged, or, in training, goes
    down `tasks.core.memory_fallback`. Of several processes, those after the first (`rank`) tell into files of their
    own, which
    nobody forwards.
    """

    def __init__(self, work: Path, rung: int = 0, bar: bool = False, rank: int = 0) -> None:
        self.work = work
        self.rung = rung
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
        """Numbers at a step (loss, learning_rate, grad_norm, tokens_per_second ...), as MLflow will show them."""
        self._emit("metrics", step=step, values={name: float(value) for name, value in values.items()})

    def tags(self, **values: str) -> None:
        """Facts about this try (a rung taken, the plan it runs by), as tags of the stage's MLflow run."""
        self._emit("tags", values=values)

    def progress(self, done: float, total: float, unit: str, note: str = "") -> None:
        """How far the long work is: `done` of `total` `unit`s; `note` is shown behind the bar (loss, ETA ...)."""
        self._emit("progress", done=done, total=total, unit=unit, note=note)
        if self._bar:
            end = "\n" if done >= total else ""
            print(f"\r{done:.0f}/{total:.0f} {unit} {note}\033[K", end=end, file=sys.stderr, flush=True)

    def log(self, message: str, level: str = "info") -> None:
        """A line for a person; `level` is `info` or `warning`."""
        self._emit("log", level=level, message=message)
        if self._bar:
            print(message, file=sys.stderr, flush=True)

    def catch_sigterm(self) -> None:
        """From now on SIGTERM raises `Preempted`, or waits for `defer_stop` to end."""
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        first, self.stop_requested = not self.stop_requested, True
        if first and not self._deferred:  # a second one must not disturb the goodbye
            raise Preempted("stopped by SIGTERM; run the same command again to go on")

    @contextmanager
    def defer_stop(self) -> Iterator[None]:
        """SIGTERM inside this block only sets `stop_requested`: a training loop saves a checkpoint first."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.stop_requested:
            raise Preempted("stopped by SIGTERM at a checkpoint; run the same command again to go on")
