"""Content-addressed artifact store in a directory or an S3 bucket (`tasks.core.backends`).

    store = open_store("s3://team/stillhouse")      # or a path, or file:///...
    digest = store.put(Path("out/teacher"))
    store.fetch(digest, Path("cache") / digest)

    blobs/<aa>/<sha256>             the bytes of a file, stored once however many artifacts hold it
    manifests/<digest>.json         an artifact: name, size and sha256 of its files. Written last: it is the commit
    index/<stage>/<cache key>.json  the stage cache: what a stage made of these inputs
    aside/...                       blobs whose bytes were found to be wrong

`report.json`, `provenance.json` and `report/` are stored and listed but do not count for the digest (see
`tasks.core.manifest`); where an artifact is stored twice, the last one's reports stay.
"""

import fcntl
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tasks.core.blobs import Blobs, OnBytes, disk_errors, open_blobs
from tasks.core.errors import BadConfig, BadData, Corrupted, Missing, StorageRefused, StorageUnavailable
from tasks.core.manifest import File, Manifest, list_files, sha256_of, size_and_mtime

REPORT_SECONDS = 0.5
Progress = Callable[[float, float, str, str], None]
"""`progress(completed, total, unit, note)`, as `Job.progress`; called at most twice a second."""


class Store:
    """Artifacts and the stage cache on top of `blobs`. Several processes may use one store at once."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self.uri = blobs.uri

    def check(self) -> None:
        """Writes and reads a tiny object: what would fail after an hour's training fails now."""
        self._blobs.check()

    def put(self, directory: Path, progress: Progress | None = None) -> str:
        """Stores the files below `directory` and returns the artifact's digest.

        Blobs that the store has are not sent again, so an interrupted `put` continues where it stopped. Links to
        files are stored as the files; empty directories are not stored.
        """
        paths = list_files(directory)
        before = {name: size_and_mtime(path) for name, path in paths.items()}
        with _byte_meter(progress, sum(size for size, _ in before.values()), "hashing") as on_bytes:
            files = [
                File(name=name, size=before[name][0], sha256=sha256_of(path, on_bytes)) for name, path in paths.items()
            ]
        missing = {file.key: file for file in files if self._blobs.size(file.key) != file.size}
        with _byte_meter(progress, sum(file.size for file in missing.values()), "storing") as on_bytes:
            for key, file in missing.items():
                self._blobs.upload(key, paths[file.name], file.sha256, on_bytes)
        changed = [name for name, path in paths.items() if size_and_mtime(path) != before[name]]
        if changed:
            raise BadData(f"{directory / changed[0]} changed while it was stored; put it again when it is finished")
        manifest = Manifest(files=tuple(files))
        self._blobs.write(_manifest_key(manifest.digest), manifest.json_bytes())
        return manifest.digest

    def has(self, digest: str) -> bool:
        """Whether the store has the artifact: its manifest, and every blob of it with the right size."""
        try:
            manifest = self.manifest(digest)
        except (Missing, Corrupted):
            return False
        return all(self._blobs.size(file.key) == file.size for file in manifest.files)

    def manifest(self, digest: str) -> Manifest:
        """The artifact's files."""
        data = self._blobs.read(_manifest_key(digest))
        if data is None:
            raise Missing(f"{self.uri} has no artifact {digest}. {REMAKE}")
        try:
            manifest = Manifest.model_validate_json(data)
        except ValidationError as error:
            raise Corrupted(f"{self.uri}/{_manifest_key(digest)} is not a manifest: {error}. {REMAKE}") from error
        if manifest.digest != digest:
            raise Corrupted(f"{self.uri}/{_manifest_key(digest)} lists the files of {manifest.digest}. {REMAKE}")
        return manifest

    def fetch(self, digest: str, target: Path, progress: Progress | None = None) -> Path:
        """Makes `target` the artifact's directory, every byte hashed again, and returns it.

        `target` is replaced atomically. If it is the artifact already, fetched before and not touched since (sizes
        and times in `<target>.fetched`), it is used as it is.
        """
        manifest = self.manifest(digest)
        target = target.absolute()
        partial = target.with_name(target.name + ".partial")
        with disk_errors(f"write to {target.parent}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.with_name(target.name + ".fetched").open("a+b") as record:
                fcntl.flock(record, fcntl.LOCK_EX)  # another process that fetches the same waits, then uses this copy
                record.seek(0)
                if record.read() == _fetch_record(manifest, target):
                    return target
                record.truncate(0)
                _remove(partial)
                try:
                    total = sum(file.size for file in manifest.files)
                    with _byte_meter(progress, total, "fetching") as on_bytes:
                        for file in manifest.files:
                            self._fetch_file(file, partial / file.name, on_bytes)
                    _remove(target)
                    partial.rename(target)
                finally:
                    _remove(partial)
                record.write(_fetch_record(manifest, target) or b"")
        return target

    def _fetch_file(self, file: File, path: Path, on_bytes: OnBytes) -> None:
        """Downloads a blob and compares its sha256; a wrong blob is set aside and raises `Corrupted`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        sha256 = ""
        for _ in range(2):  # a bad transfer is not yet a bad blob
            path.unlink(missing_ok=True)
            try:
                self._blobs.download(file.key, path, on_bytes)
            except Missing as error:
                if sha256:
                    break  # a server that verifies what it sends may withdraw the object after the first time
                raise Missing(f"{file.name}: {self.uri}/{file.key} is gone. {REMAKE}") from error
            sha256 = sha256_of(path, lambda _: None)
            if sha256 == file.sha256:
                return
        try:
            self._blobs.set_aside(file.key)  # so that `has` is False, and the next `put` stores it again
            fate = f"It was moved to {self.uri}/aside/{file.key}"
        except Missing:
            fate = "The server has withdrawn it"
        except (StorageRefused, StorageUnavailable) as error:
            fate = f"Delete it by hand ({error})"
        raise Corrupted(
            f"{file.name}: {self.uri}/{file.key} holds bytes with the sha256 {sha256} instead of {file.sha256}. "
            f"{fate}. {REMAKE}"
        )

    def read_index(self, stage: str, key: str) -> dict[str, Any] | None:
        """The value of `write_index` for this stage and cache key; None where there is none."""
        data = self._blobs.read(_index_key(stage, key))
        return None if data is None else json.loads(data)

    def write_index(self, stage: str, key: str, value: dict[str, Any]) -> None:
        """Stores a small JSON object for this stage and cache key, in place of an earlier one."""
        self._blobs.write(_index_key(stage, key), json.dumps(value, indent=1, sort_keys=True).encode())


REMAKE = "Run again: the stage that made it makes it anew; what a user put in has to be put in again"


def open_store(uri: str) -> Store:
    """The store at a path, `file:///absolute/path` or `s3://bucket/prefix`; makes nothing and asks no server yet."""
    return Store(open_blobs(uri))


def _manifest_key(digest: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise BadConfig(f"{digest!r} is no digest; it has 64 hex digits")
    return f"manifests/{digest}.json"


def _index_key(stage: str, key: str) -> str:
    for part in (stage, key):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", part):
            raise BadConfig(f"{part!r} cannot name a cache entry; use letters, digits, `_`, `-` and `.`")
    return f"index/{stage}/{key}.json"


def _fetch_record(manifest: Manifest, target: Path) -> bytes | None:
    """The content of `<target>.fetched`, computed from the files in `target`; None if they are not the artifact's."""
    try:
        names = {path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()}
        if names != {file.name for file in manifest.files}:
            return None
        lines = [f"{file.sha256} {size_and_mtime(target / file.name)} {file.name}\n" for file in manifest.files]
    except FileNotFoundError:
        return None
    return "".join([manifest.digest, "\n", *lines]).encode(errors="surrogateescape")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _byte_meter(progress: Progress | None, total: int, note: str) -> Iterator[OnBytes]:
    """A counter of bytes for several threads that calls `progress` in megabytes, twice a second and at the end."""
    copied, reported, lock = 0, 0.0, threading.Lock()

    def on_bytes(count: int) -> None:
        nonlocal copied, reported
        with lock:
            copied += count
            if progress and time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic()
                progress(min(copied, total) / 1e6, total / 1e6, "MB", note)

    yield on_bytes
    if progress and total:
        progress(total / 1e6, total / 1e6, "MB", note)
