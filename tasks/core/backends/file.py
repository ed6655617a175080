"""Blobs in a local directory: `file:///absolute/path`, or a path."""

import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote_to_bytes
from uuid import uuid4

from tasks.core.blobs import CHUNK, PROBE, OnBytes, disk_errors
from tasks.core.errors import Missing, StorageRefused

FICLONE = 0x40049409
LEFTOVER_SECONDS = 86400.0


def open_blobs(uri: str) -> "LocalBlobs":
    """The directory that `uri` names; it is made when first written to."""
    return LocalBlobs(Path(os.fsdecode(unquote_to_bytes(uri.removeprefix("file://")))).resolve())


class LocalBlobs:
    """Blobs in a directory. Safe for several processes on one machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = root.as_uri()

    def size(self, key: str) -> int | None:
        """The file's size."""
        with disk_errors(f"look into the store {self.root}"):
            try:
                return (self.root / key).stat().st_size
            except FileNotFoundError:
                return None

    def read(self, key: str) -> bytes | None:
        """The file's bytes."""
        with disk_errors(f"read from the store {self.root}"):
            try:
                return (self.root / key).read_bytes()
            except FileNotFoundError:
                return None

    def write(self, key: str, data: bytes) -> None:
        """Writes a new file and renames it to `key`."""
        with self._new_file(key) as temporary:
            temporary.write_bytes(data)

    def upload(self, key: str, path: Path, sha256: str, on_bytes: OnBytes) -> None:
        """Copies (or clones) to a new file and renames it to `key`."""
        with self._new_file(key) as temporary:
            copy_file(path, temporary, on_bytes)

    def download(self, key: str, path: Path, on_bytes: OnBytes) -> None:
        """Copies (or clones) to `path`."""
        with disk_errors(f"copy from the store {self.root} to {path.parent}"):
            try:
                copy_file(self.root / key, path, on_bytes)
            except FileNotFoundError as error:
                raise Missing(f"{self.root / key} is not there") from error

    def set_aside(self, key: str) -> None:
        """Renames."""
        aside = self.root / "aside" / key
        with disk_errors(f"write to the store {self.root}"):
            aside.parent.mkdir(parents=True, exist_ok=True)
            try:
                (self.root / key).replace(aside)
            except FileNotFoundError as error:
                raise Missing(f"{self.root / key} is not there") from error

    def check(self) -> None:
        """Also removes temporary files of killed processes that are older than a day."""
        self.write(*PROBE)
        if self.read(PROBE[0]) != PROBE[1]:
            raise StorageRefused(f"{self.root} does not give back what was written to it; choose another store")
        for leftover in (self.root / "tmp").iterdir():
            if leftover.stat().st_mtime < time.time() - LEFTOVER_SECONDS:
                leftover.unlink(missing_ok=True)

    @contextmanager
    def _new_file(self, key: str) -> Iterator[Path]:
        """A temporary path that becomes `key` at the end of the block, or nothing if the block raises."""
        path, temporary = self.root / key, self.root / "tmp" / uuid4().hex
        with disk_errors(f"write to the store {self.root}"):
            temporary.parent.mkdir(parents=True, exist_ok=True)
            try:
                yield temporary
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)


def copy_file(source: Path, target: Path, on_bytes: OnBytes) -> None:
    """Copies bytes to the new file `target`, as a copy-on-write clone where the file system has them.

    Never a hard link: someone who edits a fetched file must not edit the store.
    """
    with source.open("rb") as reader, target.open("xb") as writer:
        if sys.platform == "linux":
            try:
                fcntl.ioctl(writer.fileno(), FICLONE, reader.fileno())
            except OSError:
                pass  # another file system, or one that cannot clone
            else:
                on_bytes(source.stat().st_size)
                return
        while chunk := reader.read(CHUNK):
            writer.write(chunk)
            on_bytes(len(chunk))
