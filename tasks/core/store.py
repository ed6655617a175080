"""The store: artifacts named by what is in them, in a directory or in an S3 bucket.

    store = open_store("s3://team/stillhouse")      # or a path, or file:///...
    digest = store.put(Path("out/teacher"))
    store.fetch(digest, Path("cache") / digest)

    blobs/<aa>/<sha256>             the bytes of a file, stored once however many artifacts hold it
    manifests/<digest>.json         an artifact: name, size and sha256 of its files. Written last: it is the commit
    index/<stage>/<cache key>.json  the stage cache: what a stage made of these inputs
    aside/...                       blobs whose bytes were found to be wrong

`report.json`, `provenance.json` and `report/` are stored and listed but do not count for the digest (see
`tasks.core.manifest`); of two makings of the same thing the last one's reports are kept.
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
from urllib.parse import unquote

from pydantic import ValidationError

from tasks.core.blobs import Blobs, LocalBlobs, Moved, disk
from tasks.core.errors import BadConfig, BadData, Corrupted, Missing, StorageRefused, StorageUnavailable
from tasks.core.manifest import File, Manifest, list_files, sha256_of, stamp

Progress = Callable[[float, float, str, str], None]
"""`progress(done, total, unit, note)`, as `Job.progress`; called at most twice a second."""


class Store:
    """Artifacts and the stage cache on top of `blobs`. Several processes may use one store at once."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self.uri = blobs.uri

    def check(self) -> None:
        """Writes and reads a tiny object, to fail now and not after an hour's training."""
        self._blobs.check()

    def put(self, directory: Path, progress: Progress | None = None) -> str:
        """Stores the files below `directory` and returns the artifact's digest.

        Bytes that are there already are not sent again, so a `put` that was cut off goes on where it stopped. Links
        to files are stored as the files; empty directories are not stored.
        """
        paths = list_files(directory)
        before = {name: stamp(path) for name, path in paths.items()}
        with _meter(progress, sum(size for size, _ in before.values()), "hashing") as moved:
            files = [
                File(name=name, size=before[name][0], sha256=sha256_of(path, moved)) for name, path in paths.items()
            ]
        new = {file.key: file for file in files if self._blobs.size(file.key) != file.size}
        with _meter(progress, sum(file.size for file in new.values()), "storing") as moved:
            for key, file in new.items():
                self._blobs.upload(key, paths[file.name], file.sha256, moved)
        changed = [name for name, path in paths.items() if stamp(path) != before[name]]
        if changed:
            raise BadData(f"{directory / changed[0]} changed while it was stored; put it again when it is finished")
        manifest = Manifest(files=tuple(files))
        self._blobs.write(_manifest_key(manifest.digest), manifest.json_bytes())
        return manifest.digest

    def has(self, digest: str) -> bool:
        """Whether the artifact is there: its manifest, and every blob of it with the right size."""
        try:
            manifest = self.manifest(digest)
        except (Missing, Corrupted):
            return False
        return all(self._blobs.size(file.key) == file.size for file in manifest.files)

    def manifest(self, digest: str) -> Manifest:
        """The artifact's files."""
        data = self._blobs.read(_manifest_key(digest))
        if data is None:
            raise Missing(f"{self.uri} has no artifact {digest}. {AGAIN}")
        try:
            manifest = Manifest.model_validate_json(data)
        except ValidationError as error:
            raise Corrupted(f"{self.uri}/{_manifest_key(digest)} is not a manifest: {error}. {AGAIN}") from error
        if manifest.digest != digest:
            raise Corrupted(f"{self.uri}/{_manifest_key(digest)} lists the files of {manifest.digest}. {AGAIN}")
        return manifest

    def fetch(self, digest: str, target: Path, progress: Progress | None = None) -> Path:
        """Makes `target` the artifact's directory, every byte hashed again, and returns it.

        `target` appears whole or not at all; what was there is replaced. If it is the artifact already, fetched
        before and not touched since (sizes and times in `<target>.fetched`), it is used as it is.
        """
        manifest = self.manifest(digest)
        target = target.absolute()
        partial = target.with_name(target.name + ".partial")
        with disk(f"write to {target.parent}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.with_name(target.name + ".fetched").open("a+b") as record:
                fcntl.flock(record, fcntl.LOCK_EX)  # another process that fetches the same waits, then finds it here
                record.seek(0)
                if record.read() == _record(manifest, target):
                    return target
                record.truncate(0)
                _remove(partial)
                try:
                    with _meter(progress, sum(file.size for file in manifest.files), "fetching") as moved:
                        for file in manifest.files:
                            self._fetch(file, partial / file.name, moved)
                    _remove(target)
                    partial.rename(target)
                finally:
                    _remove(partial)
                record.write(_record(manifest, target) or b"")
        return target

    def _fetch(self, file: File, path: Path, moved: Moved) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = ""
        for _ in range(2):  # a bad transfer is not yet a bad blob
            path.unlink(missing_ok=True)
            try:
                self._blobs.download(file.key, path, moved)
            except Missing as error:
                if found:
                    break  # a server that checks what it sends may withdraw it after the first time
                raise Missing(f"{file.name}: {self.uri}/{file.key} is gone. {AGAIN}") from error
            found = sha256_of(path, lambda _: None)
            if found == file.sha256:
                return
        try:
            self._blobs.set_aside(file.key)  # so that `has` says no, and what is made again takes its place
            fate = f"It was moved to {self.uri}/aside/{file.key}"
        except Missing:
            fate = "The server has withdrawn it"
        except (StorageRefused, StorageUnavailable) as error:
            fate = f"Delete it by hand ({error})"
        raise Corrupted(
            f"{file.name}: {self.uri}/{file.key} holds bytes with the sha256 {found} instead of {file.sha256}. "
            f"{fate}. {AGAIN}"
        )

    def read_index(self, stage: str, key: str) -> dict[str, Any] | None:
        """What `write_index` stored for this stage and cache key; None if nothing."""
        data = self._blobs.read(_index_key(stage, key))
        return None if data is None else json.loads(data)

    def write_index(self, stage: str, key: str, value: dict[str, Any]) -> None:
        """Remembers a small JSON object for this stage and cache key, instead of what was there."""
        self._blobs.write(_index_key(stage, key), json.dumps(value, indent=1, sort_keys=True).encode())


AGAIN = "Run again: the stage that made it makes it anew; what a user put in has to be put in again"


def open_store(uri: str) -> Store:
    """The store at a path, `file:///absolute/path` or `s3://bucket/prefix`; makes nothing and asks no server yet."""
    if uri.startswith("s3://"):
        from tasks.core.s3 import S3Blobs  # noqa: PLC0415 (boto3 takes its time to import; directories do without)

        return Store(S3Blobs(uri))
    if uri.startswith("file:///"):
        return Store(LocalBlobs(Path(unquote(uri.removeprefix("file://"))).resolve()))
    if not uri or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", uri):
        raise BadConfig(f"{uri!r} is no store; use a path, file:///absolute/path (three slashes) or s3://bucket/prefix")
    return Store(LocalBlobs(Path(uri).expanduser().resolve()))


def _manifest_key(digest: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise BadConfig(f"{digest!r} is no digest; it has 64 hex digits")
    return f"manifests/{digest}.json"


def _index_key(stage: str, key: str) -> str:
    for part in (stage, key):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", part):
            raise BadConfig(f"{part!r} cannot name a cache entry; use letters, digits, `_`, `-` and `.`")
    return f"index/{stage}/{key}.json"


def _record(manifest: Manifest, target: Path) -> bytes | None:
    """What `<target>.fetched` says after a fetch, computed from what is there now; None if that is no artifact."""
    try:
        names = {path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()}
        if names != {file.name for file in manifest.files}:
            return None
        lines = [f"{file.sha256} {stamp(target / file.name)} {file.name}\n" for file in manifest.files]
    except FileNotFoundError:
        return None
    return "".join([manifest.digest, "\n", *lines]).encode(errors="surrogateescape")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _meter(progress: Progress | None, total: int, note: str) -> Iterator[Moved]:
    """A counter of bytes for several threads that tells `progress` megabytes, twice a second and at the end."""
    done, told, lock = 0, 0.0, threading.Lock()

    def moved(count: int) -> None:
        nonlocal done, told
        with lock:
            done += count
            if progress and time.monotonic() - told > 0.5:
                told = time.monotonic()
                progress(min(done, total) / 1e6, total / 1e6, "MB", note)

    yield moved
    if progress and total:
        progress(total / 1e6, total / 1e6, "MB", note)
