"""The store on a directory and on a real S3 server, with the same tests, and its table of backends."""

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.core import backends
from tasks.core.errors import BadConfig, BadData, Corrupted, Missing, NoSpace, StorageRefused
from tasks.core.store import Store, open_store

BIG = 65 << 20


class Backend:
    """A store with access to its objects: `change(key, edit)` rewrites one, or deletes it if `edit` returns None."""

    def __init__(self, uri: str, change: Callable[[str, Callable[[bytes], bytes | None]], None]) -> None:
        self.uri, self.change, self.store = uri, change, open_store(uri)

    def blob(self, digest: str, name: str) -> str:
        return next(file.key for file in self.store.manifest(digest).files if file.name == name)


@pytest.fixture(params=["local", "s3"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    if request.param == "local":
        root = tmp_path / "store"

        def change_file(key: str, edit: Callable[[bytes], bytes | None]) -> None:
            new = edit((root / key).read_bytes() if (root / key).exists() else b"")
            (root / key).parent.mkdir(parents=True, exist_ok=True)
            (root / key).write_bytes(new) if new is not None else (root / key).unlink()

        return Backend(str(root), change_file)
    s3 = request.getfixturevalue("s3")
    client = s3.client

    def change_object(key: str, edit: Callable[[bytes], bytes | None]) -> None:
        name: Any = {"Bucket": s3.name, "Key": f"team/stillhouse/{key}"}
        try:
            old = client.get_object(**name)["Body"].read()
        except client.exceptions.NoSuchKey:
            old = b""
        new = edit(old)
        client.put_object(**name, Body=new) if new is not None else client.delete_object(**name)

    return Backend(s3.uri, change_object)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory as a stage leaves it."""
    return write(
        tmp_path / "model",
        {
            "config.json": b'{"hidden_size": 640}',
            "model.safetensors": os.urandom(300_000),
            "empty": b"",
            "tokenizer/größe 1.txt": b"words",
            "report.json": b'{"seconds": 1.5}',
            "provenance.json": b"{}",
            "report/loss.png": b"picture",
        },
    )


def write(directory: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def digest_of(directory: Path, other_store: Path) -> str:
    """The digest that `put` will return, without the backend under test."""
    return open_store(str(other_store)).put(directory)


def test_round_trip(backend: Backend, model: Path, tmp_path: Path) -> None:
    digest = backend.store.put(model)
    assert backend.store.has(digest)
    assert contents(backend.store.fetch(digest, tmp_path / "inputs" / digest)) == contents(model)
    names = [file.name for file in backend.store.manifest(digest).files]
    assert names == sorted(contents(model))
    assert backend.store.put(model) == digest


def test_large_file_with_progress(backend: Backend, tmp_path: Path) -> None:
    reports: list[tuple[float, float, str, str]] = []
    block = os.urandom(1 << 20)
    directory = write(tmp_path / "large", {"weights.bin": block * (BIG >> 20), "notes": b"n"})
    digest = backend.store.put(directory, progress=lambda *event: reports.append(event))
    backend.store.fetch(digest, tmp_path / "back", progress=lambda *event: reports.append(event))
    assert (tmp_path / "back/weights.bin").stat().st_size == BIG
    assert (tmp_path / "back/weights.bin").read_bytes() == block * (BIG >> 20)
    for note in ("hashing", "storing", "fetching"):
        events = [event for event in reports if event[3] == note]
        assert events[-1][:3] == ((BIG + 1) / 1e6, (BIG + 1) / 1e6, "MB")
        assert len(events) < 60


def test_reports_and_provenance_do_not_count_for_the_digest(backend: Backend, model: Path, tmp_path: Path) -> None:
    digest = backend.store.put(model)
    write(model, {"report.json": b'{"seconds": 9}', "report/loss.png": b"other", "report/new.html": b"page"})
    assert backend.store.put(model) == digest
    assert contents(backend.store.fetch(digest, tmp_path / "back"))["report.json"] == b'{"seconds": 9}'
    write(model, {"config.json": b'{"hidden_size": 641}'})
    assert backend.store.put(model) != digest


def test_digest_of_an_artifact_that_is_only_a_report(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    first = store.put(write(tmp_path / "one", {"report.json": b"1", "report/a.html": b"1"}))
    second = store.put(write(tmp_path / "two", {"report.json": b"2", "report/a.html": b"1"}))
    assert first != second
    assert contents(store.fetch(first, tmp_path / "back"))["report.json"] == b"1"


def test_digest_is_stable(tmp_path: Path) -> None:
    directory = write(tmp_path / "a", {"b/c": b"x", "a": b""})
    listing = [
        {"name": name, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        for name, data in (("a", b""), ("b/c", b"x"))
    ]
    expected = hashlib.sha256(json.dumps(listing, separators=(",", ":")).encode()).hexdigest()
    assert open_store(str(tmp_path / "store")).put(directory) == expected


def test_flipped_byte_is_detected_and_stored_again(backend: Backend, model: Path, tmp_path: Path) -> None:
    digest = backend.store.put(model)
    weights = backend.blob(digest, "model.safetensors")
    good = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    bad = hashlib.sha256(flipped((model / "model.safetensors").read_bytes())).hexdigest()
    backend.change(weights, flipped)
    assert backend.store.has(digest)  # the size is right; only reading tells
    with pytest.raises(Corrupted, match="model.safetensors") as caught:
        backend.store.fetch(digest, tmp_path / "back")
    assert good in str(caught.value)
    assert bad in str(caught.value)
    assert [path.name for path in tmp_path.glob("back*")] == ["back.fetched"]
    assert not backend.store.has(digest)
    assert backend.store.put(model) == digest
    assert contents(backend.store.fetch(digest, tmp_path / "back")) == contents(model)


def test_deleted_or_truncated_blob_is_stored_again(backend: Backend, model: Path, tmp_path: Path) -> None:
    digest = backend.store.put(model)
    weights = backend.blob(digest, "model.safetensors")
    for damage in (lambda _: None, lambda data: data[:-1]):
        backend.change(weights, damage)
        assert not backend.store.has(digest)
        with pytest.raises((Missing, Corrupted), match="model.safetensors"):
            backend.store.fetch(digest, tmp_path / "back")
        assert not (tmp_path / "back").exists()
        assert backend.store.put(model) == digest
        assert backend.store.has(digest)
        backend.store.fetch(digest, tmp_path / "again")
        assert contents(tmp_path / "again") == contents(model)


def test_missing_or_wrong_manifest(backend: Backend, model: Path, tmp_path: Path) -> None:
    digest = backend.store.put(model)
    other = backend.store.put(write(tmp_path / "other", {"a": b"1"}))
    key = f"manifests/{digest}.json"
    wrong: bytes = json.dumps(backend.store.manifest(other).model_dump()).encode()
    for broken in (b"{", wrong):
        backend.change(key, lambda _, broken=broken: broken)
        assert not backend.store.has(digest)
        with pytest.raises(Corrupted, match=digest):
            backend.store.fetch(digest, tmp_path / "back")
    backend.change(key, lambda _: None)
    assert not backend.store.has(digest)
    with pytest.raises(Missing, match=digest):
        backend.store.fetch(digest, tmp_path / "back")
    with pytest.raises(BadConfig, match="hex digits"):
        backend.store.has("../../etc/passwd")


def test_manifest_cannot_write_outside(backend: Backend, tmp_path: Path) -> None:
    for name in ("../evil", "/tmp/evil", "a/../../evil", ""):
        file = {"name": name, "size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
        digest = hashlib.sha256(json.dumps([file], sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        backend.change(f"manifests/{digest}.json", lambda _, file=file: json.dumps({"files": [file]}).encode())
        with pytest.raises(Corrupted, match="not a path below"):
            backend.store.fetch(digest, tmp_path / "deep" / "back")


class Stop(Exception):
    """Raised in the middle."""


def test_interrupted_put_continues(backend: Backend, model: Path, tmp_path: Path) -> None:
    digest = digest_of(model, tmp_path / "other_store")
    totals: list[float] = []

    def stop(completed: float, total: float, unit: str, note: str) -> None:
        if note == "storing":
            totals.append(total)
            raise Stop

    def record(completed: float, total: float, unit: str, note: str) -> None:
        if note == "storing":
            totals.append(total)

    with pytest.raises(Stop):
        backend.store.put(model, progress=stop)
    assert not backend.store.has(digest)
    with pytest.raises(Missing):
        backend.store.manifest(digest)
    assert backend.store.put(model, progress=record) == digest
    assert backend.store.has(digest)
    assert totals[0] >= totals[-1] > 0.3  # MB
    totals.clear()
    backend.store.put(model, progress=record)
    assert totals == []  # path left to send


PUT = """
import os, signal, sys
from pathlib import Path
from tasks.core.store import open_store
def kill(done, total, unit, note):
    if note == "storing":
        os.kill(os.getpid(), signal.SIGKILL)
store = open_store(sys.argv[1])
digest = store.put(Path(sys.argv[2]), progress=kill if sys.argv[4] == "kill" else None)
store.fetch(digest, Path(sys.argv[3]))
store.write_index("teacher", "key", {"digest": digest})
print(digest)
"""


def start(backend: Backend, directory: Path, target: Path, mode: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PUT, backend.uri, str(directory), str(target), mode]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)


def test_killed_put_continues(backend: Backend, model: Path, tmp_path: Path) -> None:
    digest = digest_of(model, tmp_path / "other_store")
    process = start(backend, model, tmp_path / "back", "kill")
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert not backend.store.has(digest)
    assert backend.store.put(model) == digest
    assert contents(backend.store.fetch(digest, tmp_path / "back")) == contents(model)


def test_two_concurrent_processes(backend: Backend, model: Path, tmp_path: Path) -> None:
    processes = [start(backend, model, tmp_path / "back", "whole") for _ in range(2)]
    digests = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert digests[0] == digests[1]
    assert backend.store.has(digests[0])
    assert contents(tmp_path / "back") == contents(model)
    assert backend.store.read_index("teacher", "key") == {"digest": digests[0]}


def test_fetched_directory_is_reused_while_unchanged(backend: Backend, model: Path, tmp_path: Path) -> None:
    digest, target = backend.store.put(model), tmp_path / "back"
    inode = backend.store.fetch(digest, target).stat().st_ino
    assert backend.store.fetch(digest, target).stat().st_ino == inode
    (target / "config.json").write_bytes(b'{"hidden_size": 999}')  # same size
    backend.store.fetch(digest, tmp_path / "other")
    assert contents(tmp_path / "other") == contents(model)  # the store does not share the edited file
    for touch in (
        lambda: None,
        lambda: (target / "tokenizer/größe 1.txt").unlink(),
        lambda: (target / "more").write_bytes(b""),
        lambda: (target / "config.json").touch(),
    ):
        touch()
        before = target.stat().st_ino
        assert contents(backend.store.fetch(digest, target)) == contents(model)
        assert target.stat().st_ino != before


def test_second_fetch_waits_and_uses_the_first_one_s_copy(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, reports, at_lock = open_store(str(tmp_path / "store")), [], threading.Event()
    digest, target = store.put(model), tmp_path / "back"
    second = threading.Thread(target=store.fetch, args=(digest, target, lambda *event: reports.append(event)))
    flock = fcntl.flock

    def observed_flock(file: Any, operation: int) -> None:
        if threading.current_thread() is second:
            at_lock.set()
        flock(file, operation)

    def start_second(*event: object) -> None:
        if not second.ident:
            second.start()
            assert at_lock.wait(10)

    monkeypatch.setattr(fcntl, "flock", observed_flock)
    store.fetch(digest, target, progress=start_second)
    second.join()
    assert reports == []
    assert contents(target) == contents(model)


def test_fetch_replaces_the_target(backend: Backend, model: Path, tmp_path: Path) -> None:
    target = write(tmp_path / "back", {"old": b"old"})
    (tmp_path / "back.partial").mkdir()  # of a process that was killed
    assert contents(backend.store.fetch(backend.store.put(model), target)) == contents(model)
    assert not (tmp_path / "back.partial").exists()


def test_index(backend: Backend) -> None:
    assert backend.store.read_index("teacher", "ab12") is None
    for value in ({"digest": "1", "facts": {"loss": 0.5, "note": "größe"}}, {"digest": "2"}):
        backend.store.write_index("teacher", "ab12", value)
        assert backend.store.read_index("teacher", "ab12") == value
    assert backend.store.read_index("distill", "ab12") is None
    for stage, key in (("../teacher", "a"), ("teacher", ".."), ("teacher", "a/b"), ("", "a")):
        with pytest.raises(BadConfig, match="cache entry"):
            backend.store.write_index(stage, key, {})


def test_links_and_oddities(backend: Backend, tmp_path: Path) -> None:
    directory = write(tmp_path / "linked", {"a": b"1"})
    (directory / "b").symlink_to(write(tmp_path / "hub", {"blob": b"weights"}) / "blob")  # as the hub's cache has it
    assert contents(backend.store.fetch(backend.store.put(directory), tmp_path / "back")) == {
        "a": b"1",
        "b": b"weights",
    }
    assert not (tmp_path / "back/b").is_symlink()
    for name, make in (
        ("folder", lambda path: path.symlink_to(tmp_path / "hub")),
        ("dangling", lambda path: path.symlink_to(tmp_path / "nowhere")),
        ("pipe", os.mkfifo),
    ):
        make(directory / name)
        with pytest.raises(BadData, match=name):
            backend.store.put(directory)
        (directory / name).unlink()
    for path in (tmp_path / "nowhere", tmp_path / "linked/a", tmp_path / "empty"):
        (tmp_path / "empty/folder").mkdir(parents=True, exist_ok=True)
        with pytest.raises(BadData, match=path.name):
            backend.store.put(path)


def test_file_that_changes_while_it_is_stored(backend: Backend, model: Path, tmp_path: Path) -> None:
    def change(completed: float, of: float, unit: str, note: str) -> None:
        with (model / "config.json").open("ab") as file:
            file.write(b" ")

    digest = digest_of(model, tmp_path / "other_store")
    with pytest.raises(BadData, match=r"config.json changed"):
        backend.store.put(model, progress=change)
    assert not backend.store.has(digest)


def test_check(backend: Backend) -> None:
    backend.store.check()
    backend.store.check()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "small"
    path.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", path], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"cannot mount a small disk: {mount.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def test_no_space_to_fetch(backend: Backend, tmp_path: Path, small_disk: Path) -> None:
    digest = backend.store.put(write(tmp_path / "large", {"weights": os.urandom(3 << 20)}))
    with pytest.raises(NoSpace, match="no space"):
        backend.store.fetch(digest, small_disk / "back")
    assert [path.name for path in small_disk.iterdir()] == ["back.fetched"]
    assert backend.store.has(digest)


def test_no_space_to_store(tmp_path: Path, small_disk: Path) -> None:
    store = open_store(str(small_disk / "store"))
    fits = store.put(write(tmp_path / "fits", {"a": b"1"}))
    large = write(tmp_path / "large", {"weights": os.urandom(3 << 20)})
    with pytest.raises(NoSpace, match="Free some"):
        store.put(large)
    assert list((small_disk / "store/tmp").iterdir()) == []
    assert store.has(fits)
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    assert store.has(store.put(large))


def test_leftovers_of_killed_processes_go_after_a_day(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    old, fresh = (write(tmp_path / "store/tmp", {name: b"half"}) / name for name in ("old", "fresh"))
    os.utime(old, (0, 0))
    store.check()
    assert (old.exists(), fresh.exists()) == (False, True)


def test_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    root = tmp_path / "my store #1"
    digest = open_store(str(root)).put(model)
    for uri in ("my store #1", "./my store #1", "~/my store #1", root.as_uri(), open_store(str(root)).uri):
        store = open_store(uri)
        assert store.has(digest)
        assert store.uri == root.as_uri() == f"file://{tmp_path}/my%20store%20%231"
    for wrong in ("", "file://relative/path", "file:relative", "s3:bucket", "gs://bucket/x", "http://host/x", "s3://"):
        with pytest.raises(BadConfig, match=r"s3://(bucket/prefix|BUCKET/PREFIX)"):
            open_store(wrong)


def test_store_that_cannot_be_written(tmp_path: Path, model: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store: Store = open_store(str(tmp_path / "file"))
    for use in (store.check, lambda: store.put(model), lambda: store.write_index("a", "b", {})):
        with pytest.raises(StorageRefused, match="this user may write to"):
            use()


def test_directories_need_no_boto3() -> None:
    code = "import sys, tasks.core.store as s; s.open_store('x'); print({'boto3', 'botocore'} & set(sys.modules))"
    root = Path(__file__).parents[2]
    process = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "set()"


MEMORY_BACKEND = """
class MemoryBlobs:
    def __init__(self, uri):
        self.uri, self.objects = uri, {}
    def size(self, key):
        return len(self.objects[key]) if key in self.objects else None
    def read(self, key):
        return self.objects.get(key)
    def write(self, key, data):
        self.objects[key] = data
    def upload(self, key, path, sha256, on_bytes):
        self.write(key, path.read_bytes())
    def download(self, key, path, on_bytes):
        path.write_bytes(self.objects[key])
    def set_aside(self, key):
        self.objects["aside/" + key] = self.objects.pop(key)
    def check(self):
        pass

open_blobs = MemoryBlobs
"""


def test_a_module_in_the_folder_of_backends_is_a_backend(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadConfig):
        open_store("memory://here")
    (tmp_path / "backends").mkdir()
    (tmp_path / "backends/memory.py").write_text(MEMORY_BACKEND)
    monkeypatch.setattr(backends, "__path__", [*backends.__path__, str(tmp_path / "backends")])
    store = open_store("memory://here")
    assert contents(store.fetch(store.put(model), tmp_path / "back")) == contents(model)
    with pytest.raises(BadConfig, match="or memory://bucket/prefix or s3://bucket/prefix"):
        open_store("gs://bucket")
    monkeypatch.delitem(sys.modules, f"{backends.__name__}.memory")
