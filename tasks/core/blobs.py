"""What the store asks of a backend: bytes under keys, and how a backend is found by a store's URI."""

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from tasks.core import backends
from tasks.core.errors import BadConfig, NoSpace, StorageRefused, StorageUnavailable

OnBytes = Callable[[int], None]
"""Called with the number of bytes that were just copied, from several threads at once."""

CHUNK = 1 << 20
PROBE = "check.json", b'{"stillhouse": "can write and read here"}\n'
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


class Blobs(Protocol):
    """Bytes under keys. A write is whole or absent: no reader ever sees half of one. Errors are StageErrors."""

    uri: str

    def size(self, key: str) -> int | None:
        """Bytes under `key`; None where there is nothing."""

    def read(self, key: str) -> bytes | None:
        """All bytes of a small object; None where there is nothing."""

    def write(self, key: str, data: bytes) -> None:
        """Stores a small object in place of the one that is there."""

    def upload(self, key: str, path: Path, sha256: str, on_bytes: OnBytes) -> None:
        """Stores a file of any size."""

    def download(self, key: str, path: Path, on_bytes: OnBytes) -> None:
        """Copies an object to the new file `path`, unverified; `Missing` where there is nothing."""

    def set_aside(self, key: str) -> None:
        """Moves an object to `aside/<key>`, where nothing reads it but a person; `Missing` where there is nothing."""

    def check(self) -> None:
        """Writes and reads a tiny object, and raises the error that a later write would meet."""


def open_blobs(uri: str) -> Blobs:
    """The blobs at a path or a URI, by the backend of its scheme; makes nothing and asks no server yet.

    Raises BadConfig for an unknown scheme and for a `file:` URI that is not absolute.
    """
    match = SCHEME.match(uri)
    scheme = match[1] if match else "file"
    written = not match or uri.startswith("file:///" if scheme == "file" else f"{scheme}://")
    if not uri or not written or scheme not in backends.schemes():
        examples = " or ".join(f"{name}://bucket/prefix" for name in backends.schemes() if name != "file")
        raise BadConfig(f"{uri!r} is no store; use a path, file:///absolute/path (three slashes) or {examples}")
    location = uri if match else Path(uri).expanduser().absolute().as_uri()
    return cast(Blobs, import_module(f"{backends.__name__}.{scheme}").open_blobs(location))


@contextmanager
def disk_errors(action: str) -> Iterator[None]:
    """Turns OSErrors of the block into StageErrors that say which `action` failed."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"no space left to {action}: {error}. Free some, or use a larger disk") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            raise StorageRefused(
                f"cannot {action}: {error}. Make it a directory that this user may write to"
            ) from error
        raise StorageUnavailable(f"cannot {action}: {error}") from error
