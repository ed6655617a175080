"""Local copies of artifacts, `<home>/inputs/<digest>`: fetched when a stage needs them, removed a week after use."""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.core.settings import Settings
from tasks.core.store import Progress, open_store

RETENTION_SECONDS = 7 * 24 * 3600.0


def fetch_input(settings: Settings, digest: str, progress: Progress | None = None) -> Path:
    """Fetches an artifact, verifies every byte, and returns its directory, which must only be read."""
    with inputs_in_use(settings):
        directory = open_store(settings.store_uri).fetch(digest, settings.root / "inputs" / digest, progress)
        os.utime(directory.with_name(directory.name + ".fetched"))
    return directory


@contextmanager
def inputs_in_use(settings: Settings) -> Iterator[None]:
    """Keeps `remove_unused_inputs` from removing anything until the block ends, or its process is killed."""
    with _lock(settings).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def remove_unused_inputs(settings: Settings) -> None:
    """Removes inputs not fetched for a week, and the locks of outputs; nothing while a stage runs on this host."""
    with _lock(settings).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        for record in (settings.root / "inputs").glob("*.fetched"):
            if record.stat().st_mtime < time.time() - RETENTION_SECONDS:
                for directory in (record.with_suffix(""), record.with_suffix(".partial")):
                    shutil.rmtree(directory, ignore_errors=True)
                record.unlink()
        for lock in (settings.root / "scratch").glob("*.lock"):  # a run that waits for one holds `inputs_in_use`
            lock.unlink()


def _lock(settings: Settings) -> Path:
    return settings.root / "inputs.lock"
