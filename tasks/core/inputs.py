"""Artifacts on this machine: `<home>/inputs/<digest>`, fetched for whoever reads them, removed when nobody does."""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.core.settings import Settings
from tasks.core.store import Progress, open_store

KEPT_SECONDS = 7 * 24 * 3600.0


def fetched(settings: Settings, digest: str, progress: Progress | None = None) -> Path:
    """The artifact's directory, every byte verified; to be read only. It stays for a week, or as long as `in_use`."""
    with in_use(settings):
        found = open_store(settings.store_uri).fetch(digest, settings.root / "inputs" / digest, progress)
        os.utime(found.with_name(found.name + ".fetched"))
    return found


@contextmanager
def in_use(settings: Settings) -> Iterator[None]:
    """Until the block ends, or its process is killed, nothing is removed."""
    with _lock(settings).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def remove_unused(settings: Settings) -> None:
    """Removes what nobody has fetched for a week, and the locks of outputs; nothing while a stage runs on this host."""
    with _lock(settings).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        for record in (settings.root / "inputs").glob("*.fetched"):
            if record.stat().st_mtime < time.time() - KEPT_SECONDS:
                for directory in (record.with_suffix(""), record.with_suffix(".partial")):
                    shutil.rmtree(directory, ignore_errors=True)
                record.unlink()
        for lock in (settings.root / "scratch").glob("*.lock"):  # whoever waits for one is `in_use`
            lock.unlink()


def _lock(settings: Settings) -> Path:
    return settings.root / "inputs.lock"
