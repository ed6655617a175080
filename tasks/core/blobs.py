"""Where the store keeps its bytes: what it asks of a backend, and the backend that is a local directory."""

import errno
import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from tasks.core.errors import Missing, NoSpace, StorageRefused, StorageUnavailable

Moved = Callable[[int], None]
"""Told the number of bytes that were just copied; may be called from several threads."""

CHUNK = 1 << 20
FICLONE = 0x40049409
PROBE = "check.json", b'{"stillhouse": "can write and read here"}\n'


class Blobs(Protocol):
    """Bytes under keys. A write is whole or absent: no reader ever sees half of one. Errors are StageErrors."""

    uri: str

    def size(self, key: str) -> int | None:
        """Bytes under `key`; None where there is nothing."""

    def read(self, key: str) -> bytes | None:
        """A small object whole; None where there is nothing."""

    def write(self, key: str, data: bytes) -> None:
        """Stores a small object, over what was there."""

    def upload(self, key: str, path: Path, sha256: str, moved: Moved) -> None:
        """Stores a file of any size."""

    def download(self, key: str, path: Path, moved: Moved) -> None:
        """Copies an object to the new file `path`, unverified; `Missing` where there is nothing."""

    def set_aside(self, key: str) -> None:
        """Moves an object to `aside/<key>`, where nothing reads it but a person; `Missing` where there is nothing."""

    def check(self) -> None:
        """Writes and reads a tiny object: raises what would go wrong later."""


class LocalBlobs:
    """Blobs in a directory, made when first written to. Safe for several processes on one machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = root.as_uri()

    def size(self, key: str) -> int | None:
        """The file's size."""
        with disk(f"look into the store {self.root}"):
            try:
                return (self.root / key).stat().st_size
            except FileNotFoundError:
                return None

    def read(self, key: str) -> bytes | None:
        """The file's bytes."""
        with disk(f"read from the store {self.root}"):
            try:
                return (self.root / key).read_bytes()
            except FileNotFoundError:
                return None

    def write(self, key: str, data: bytes) -> None:
        """Writes a new file and renames it to `key`."""
        with self._new(key) as temporary:
            temporary.write_bytes(data)

    def upload(self, key: str, path: Path, sha256: str, moved: Moved) -> None:
        """Copies (or clones) to a new file and renames it to `key`."""
        with self._new(key) as temporary:
            copy(path, temporary, moved)

    def download(self, key: str, path: Path, moved: Moved) -> None:
        """Copies (or clones) to `path`."""
        with disk(f"copy from the store {self.root} to {path.parent}"):
            try:
                copy(self.root / key, path, moved)
            except FileNotFoundError as error:
                raise Missing(f"{self.root / key} is not there") from error

    def set_aside(self, key: str) -> None:
        """Renames."""
        aside = self.root / "aside" / key
        with disk(f"write to the store {self.root}"):
            aside.parent.mkdir(parents=True, exist_ok=True)
            try:
                (self.root / key).replace(aside)
            except FileNotFoundError as error:
                raise Missing(f"{self.root / key} is not there") from error

    def check(self) -> None:
        """Also removes what killed processes left behind more than a day ago."""
        self.write(*PROBE)
        if self.read(PROBE[0]) != PROBE[1]:
            raise StorageRefused(f"{self.root} does not give back what was written to it; choose another store")
        yesterday = time.time() - 86400
        for leftover in (self.root / "tmp").iterdir():  # of processes that were killed
            if leftover.stat().st_mtime < yesterday:
                leftover.unlink(missing_ok=True)

    @contextmanager
    def _new(self, key: str) -> Iterator[Path]:
        """A temporary path that becomes `key` at the end of the block, or nothing if the block raises."""
        path, temporary = self.root / key, self.root / "tmp" / uuid4().hex
        with disk(f"write to the store {self.root}"):
            temporary.parent.mkdir(parents=True, exist_ok=True)
            try:
                yield temporary
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)


def copy(source: Path, target: Path, moved: Moved) -> None:
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
                moved(source.stat().st_size)
                return
        while chunk := reader.read(CHUNK):
            writer.write(chunk)
            moved(len(chunk))


@contextmanager
def disk(doing: str) -> Iterator[None]:
    """Turns OSErrors of the block into StageErrors that say what could not be done."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"no space left to {doing}: {error}. Free some, or use a larger disk") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            raise StorageRefused(f"cannot {doing}: {error}. Make it a directory that this user may write to") from error
        raise StorageUnavailable(f"cannot {doing}: {error}") from error
