"""Manifest of an artifact: its files, their sha256, and the digest that names it.

The digest is the sha256 of the file list (canonical JSON) without `report.json`, `provenance.json` and `report/`:
these hold times, host and commit, and a stage that runs again with the same result gives the same digest. An artifact
that is nothing but a report is named by all its files.
"""

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from tasks.core.blobs import CHUNK, OnBytes
from tasks.core.errors import BadData

REPORTS = ("report.json", "provenance.json", "report")


def _relative_name(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or name == ".":
        raise ValueError(f"{name!r} is not a path below the artifact")
    return name


class File(BaseModel):
    """A file of an artifact: its path below the artifact, with `/`; its bytes; their sha256."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, AfterValidator(_relative_name)]
    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @property
    def key(self) -> str:
        """The blob's key in the store."""
        return f"blobs/{self.sha256[:2]}/{self.sha256}"


class Manifest(BaseModel):
    """The files of an artifact, sorted by name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: tuple[File, ...]

    @property
    def digest(self) -> str:
        """The artifact's name, 64 hex digits."""
        content = [file for file in self.files if PurePosixPath(file.name).parts[0] not in REPORTS]
        listing = [file.model_dump() for file in content or self.files]
        return hashlib.sha256(json.dumps(listing, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def json_bytes(self) -> bytes:
        """The manifest as the store keeps it."""
        return (json.dumps(self.model_dump(), indent=1) + "\n").encode()


def list_files(directory: Path) -> dict[str, Path]:
    """Every file below `directory` by its name in the manifest, sorted."""
    if not directory.is_dir():
        raise BadData(f"{directory} is not a directory")
    files = {}
    for path in directory.rglob("*"):
        if path.is_symlink() and path.is_dir():
            raise BadData(f"{path} is a link to a directory; copy the directory here instead")
        if path.is_dir():
            continue
        if not path.is_file():
            raise BadData(f"{path} is not a file (a dangling link, a pipe, a socket); remove it")
        name = path.relative_to(directory).as_posix()
        if not name.isprintable():
            raise BadData(f"{directory}: the name {name!r} is not printable UTF-8; rename the file")
        files[name] = path
    if not files:
        raise BadData(f"{directory} has no files to store")
    return dict(sorted(files.items()))


def size_and_mtime(path: Path) -> tuple[int, int]:
    """Bytes and time of the last change in ns: shows that a file was touched without reading it."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def sha256_of(path: Path, on_bytes: OnBytes) -> str:
    """The sha256 of a file, in hex."""
    digest, buffer = hashlib.sha256(), bytearray(CHUNK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
            on_bytes(count)
    return digest.hexdigest()
