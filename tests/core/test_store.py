"""The store's promises, kept by a directory and by a real S3 server alike."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.core.errors import BadConfig, BadData, Corrupted, Missing, NoSpace, StorageRefused
from tasks.core.store import Store, open_store

BIG = 65 << 20


class Place:
    """A store and a way behind its back: `change(key, how)` rewrites an object, or deletes it if `how` gives None."""

    def __init__(self, uri: str, change: Callable[[str, Callable[[bytes], bytes | None]], None]) -> None:
        self.uri, self.change, self.store = uri, change, open_store(uri)

    def blob(self, digest: str, name: str) -> str:
        return next(file.key for file in self.store.manifest(digest).files if file.name == name)


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "local":
        root = tmp_path / "store"

        def change_file(key: str, how: Callable[[bytes], bytes | None]) -> None:
            new = how((root / key).read_bytes() if (root / key).exists() else b"")
            (root / key).parent.mkdir(parents=True, exist_ok=True)
            (root / key).write_bytes(new) if new is not None else (root / key).unlink()

        return Place(str(root), change_file)
    s3 = request.getfixturevalue("s3")
    client = s3.client

    def change_object(key: str, how: Callable[[bytes], bytes | None]) -> None:
        where: Any = {"Bucket": s3.name, "Key": f"team/stillhouse/{key}"}
        try:
            old = client.get_object(**where)["Body"].read()
        except client.exceptions.NoSuchKey:
            old = b""
        new = how(old)
        client.put_object(**where, Body=new) if new is not None else client.delete_object(**where)

    return Place(s3.uri, change_object)


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


def digest_of(directory: Path, elsewhere: Path) -> str:
    """What `put` will return, without the place under test."""
    return open_store(str(elsewhere)).put(directory)


def test_round_trip(place: Place, model: Path, tmp_path: Path) -> None:
    digest = place.store.put(model)
    assert place.store.has(digest)
    assert contents(place.store.fetch(digest, tmp_path / "inputs" / digest)) == contents(model)
    names = [file.name for file in place.store.manifest(digest).files]
    assert names == sorted(contents(model))
    assert place.store.put(model) == digest


def test_large_file_with_progress(place: Place, tmp_path: Path) -> None:
    seen: list[tuple[float, float, str, str]] = []
    block = os.urandom(1 << 20)
    directory = write(tmp_path / "large", {"weights.bin": block * (BIG >> 20), "notes": b"n"})
    digest = place.store.put(directory, progress=lambda *event: seen.append(event))
    place.store.fetch(digest, tmp_path / "back", progress=lambda *event: seen.append(event))
    assert (tmp_path / "back/weights.bin").stat().st_size == BIG
    assert (tmp_path / "back/weights.bin").read_bytes() == block * (BIG >> 20)
    for note in ("hashing", "storing", "fetching"):
        events = [event for event in seen if event[3] == note]
        assert events[-1][:3] == ((BIG + 1) / 1e6, (BIG + 1) / 1e6, "MB")
        assert len(events) < 60


def test_digest_names_what_was_made_not_the_making(place: Place, model: Path, tmp_path: Path) -> None:
    digest = place.store.put(model)
    write(model, {"report.json": b'{"seconds": 9}', "report/loss.png": b"other", "report/new.html": b"page"})
    assert place.store.put(model) == digest
    assert contents(place.store.fetch(digest, tmp_path / "back"))["report.json"] == b'{"seconds": 9}'
    write(model, {"config.json": b'{"hidden_size": 641}'})
    assert place.store.put(model) != digest


def test_digest_of_an_artifact_that_is_only_a_report(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    one = store.put(write(tmp_path / "one", {"report.json": b"1", "report/a.html": b"1"}))
    two = store.put(write(tmp_path / "two", {"report.json": b"2", "report/a.html": b"1"}))
    assert one != two
    assert contents(store.fetch(one, tmp_path / "back"))["report.json"] == b"1"


def test_digest_is_stable(tmp_path: Path) -> None:
    directory = write(tmp_path / "a", {"b/c": b"x", "a": b""})
    listing = [
        {"name": name, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        for name, data in (("a", b""), ("b/c", b"x"))
    ]
    expected = hashlib.sha256(json.dumps(listing, separators=(",", ":")).encode()).hexdigest()
    assert open_store(str(tmp_path / "store")).put(directory) == expected


def test_flipped_byte_is_found_and_made_again(place: Place, model: Path, tmp_path: Path) -> None:
    digest = place.store.put(model)
    weights = place.blob(digest, "model.safetensors")
    good = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    bad = hashlib.sha256(flipped((model / "model.safetensors").read_bytes())).hexdigest()
    place.change(weights, flipped)
    assert place.store.has(digest)  # the size is right; only reading tells
    with pytest.raises(Corrupted, match="model.safetensors") as caught:
        place.store.fetch(digest, tmp_path / "back")
    assert good in str(caught.value)
    assert bad in str(caught.value)
    assert [path.name for path in tmp_path.glob("back*")] == ["back.fetched"]
    assert not place.store.has(digest)
    assert place.store.put(model) == digest
    assert contents(place.store.fetch(digest, tmp_path / "back")) == contents(model)


def test_deleted_or_cut_blob_is_made_again(place: Place, model: Path, tmp_path: Path) -> None:
    digest = place.store.put(model)
    weights = place.blob(digest, "model.safetensors")
    for damage in (lambda _: None, lambda data: data[:-1]):
        place.change(weights, damage)
        assert not place.store.has(digest)
        with pytest.raises((Missing, Corrupted), match="model.safetensors"):
            place.store.fetch(digest, tmp_path / "back")
        assert not (tmp_path / "back").exists()
        assert place.store.put(model) == digest
        assert place.store.has(digest)
        place.store.fetch(digest, tmp_path / "again")
        assert contents(tmp_path / "again") == contents(model)


def test_manifest_that_is_gone_or_wrong(place: Place, model: Path, tmp_path: Path) -> None:
    digest = place.store.put(model)
    other = place.store.put(write(tmp_path / "other", {"a": b"1"}))
    key = f"manifests/{digest}.json"
    wrong: bytes = json.dumps(place.store.manifest(other).model_dump()).encode()
    for broken in (b"{", wrong):
        place.change(key, lambda _, broken=broken: broken)
        assert not place.store.has(digest)
        with pytest.raises(Corrupted, match=digest):
            place.store.fetch(digest, tmp_path / "back")
    place.change(key, lambda _: None)
    assert not place.store.has(digest)
    with pytest.raises(Missing, match=digest):
        place.store.fetch(digest, tmp_path / "back")
    with pytest.raises(BadConfig, match="hex digits"):
        place.store.has("../../etc/passwd")


def test_manifest_cannot_write_outside(place: Place, tmp_path: Path) -> None:
    for name in ("../evil", "/tmp/evil", "a/../../evil", ""):
        file = {"name": name, "size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
        digest = hashlib.sha256(json.dumps([file], sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        place.change(f"manifests/{digest}.json", lambda _, file=file: json.dumps({"files": [file]}).encode())
        with pytest.raises(Corrupted, match="not a path below"):
            place.store.fetch(digest, tmp_path / "deep" / "back")


class Stop(Exception):
    """Raised in the middle."""


def test_put_that_was_stopped_goes_on(place: Place, model: Path, tmp_path: Path) -> None:
    digest = digest_of(model, tmp_path / "elsewhere")
    totals: list[float] = []

    def stop(done: float, total: float, unit: str, note: str) -> None:
        if note == "storing":
            totals.append(total)
            raise Stop

    def look(done: float, total: float, unit: str, note: str) -> None:
        if note == "storing":
            totals.append(total)

    with pytest.raises(Stop):
        place.store.put(model, progress=stop)
    assert not place.store.has(digest)
    with pytest.raises(Missing):
        place.store.manifest(digest)
    assert place.store.put(model, progress=look) == digest
    assert place.store.has(digest)
    assert totals[0] >= totals[-1] > 0.3  # MB
    totals.clear()
    place.store.put(model, progress=look)
    assert totals == []  # nothing left to send


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


def start(place: Place, directory: Path, target: Path, mode: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PUT, place.uri, str(directory), str(target), mode]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)


def test_put_that_was_killed_goes_on(place: Place, model: Path, tmp_path: Path) -> None:
    digest = digest_of(model, tmp_path / "elsewhere")
    process = start(place, model, tmp_path / "back", "kill")
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert not place.store.has(digest)
    assert place.store.put(model) == digest
    assert contents(place.store.fetch(digest, tmp_path / "back")) == contents(model)


def test_two_processes_at_once(place: Place, model: Path, tmp_path: Path) -> None:
    processes = [start(place, model, tmp_path / "back", "whole") for _ in range(2)]
    digests = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert digests[0] == digests[1]
    assert place.store.has(digests[0])
    assert contents(tmp_path / "back") == contents(model)
    assert place.store.read_index("teacher", "key") == {"digest": digests[0]}


def test_fetched_directory_is_reused_until_touched(place: Place, model: Path, tmp_path: Path) -> None:
    digest, target = place.store.put(model), tmp_path / "back"
    inode = place.store.fetch(digest, target).stat().st_ino
    assert place.store.fetch(digest, target).stat().st_ino == inode
    (target / "config.json").write_bytes(b'{"hidden_size": 999}')  # same size
    place.store.fetch(digest, tmp_path / "other")
    assert contents(tmp_path / "other") == contents(model)  # the store does not share the edited file
    for touch in (
        lambda: None,
        lambda: (target / "tokenizer/größe 1.txt").unlink(),
        lambda: (target / "more").write_bytes(b""),
        lambda: (target / "config.json").touch(),
    ):
        touch()
        before = target.stat().st_ino
        assert contents(place.store.fetch(digest, target)) == contents(model)
        assert target.stat().st_ino != before


def test_second_fetch_waits_and_finds_it_there(tmp_path: Path, model: Path) -> None:
    store, told = open_store(str(tmp_path / "store")), []
    digest, target = store.put(model), tmp_path / "back"
    second = threading.Thread(target=store.fetch, args=(digest, target, lambda *event: told.append(event)))

    def start_second(*event: object) -> None:
        if not second.ident:
            second.start()
            time.sleep(0.5)

    store.fetch(digest, target, progress=start_second)
    second.join()
    assert told == []
    assert contents(target) == contents(model)


def test_fetch_replaces_what_was_there(place: Place, model: Path, tmp_path: Path) -> None:
    target = write(tmp_path / "back", {"old": b"old"})
    (tmp_path / "back.partial").mkdir()  # of a process that was killed
    assert contents(place.store.fetch(place.store.put(model), target)) == contents(model)
    assert not (tmp_path / "back.partial").exists()


def test_index(place: Place) -> None:
    assert place.store.read_index("teacher", "ab12") is None
    for value in ({"digest": "1", "facts": {"loss": 0.5, "note": "größe"}}, {"digest": "2"}):
        place.store.write_index("teacher", "ab12", value)
        assert place.store.read_index("teacher", "ab12") == value
    assert place.store.read_index("distill", "ab12") is None
    for stage, key in (("../teacher", "a"), ("teacher", ".."), ("teacher", "a/b"), ("", "a")):
        with pytest.raises(BadConfig, match="cache entry"):
            place.store.write_index(stage, key, {})


def test_links_and_oddities(place: Place, tmp_path: Path) -> None:
    directory = write(tmp_path / "linked", {"a": b"1"})
    (directory / "b").symlink_to(write(tmp_path / "hub", {"blob": b"weights"}) / "blob")  # as the hub's cache has it
    assert contents(place.store.fetch(place.store.put(directory), tmp_path / "back")) == {"a": b"1", "b": b"weights"}
    assert not (tmp_path / "back/b").is_symlink()
    for name, make in (
        ("folder", lambda path: path.symlink_to(tmp_path / "hub")),
        ("dangling", lambda path: path.symlink_to(tmp_path / "nowhere")),
        ("pipe", os.mkfifo),
    ):
        make(directory / name)
        with pytest.raises(BadData, match=name):
            place.store.put(directory)
        (directory / name).unlink()
    for nothing in (tmp_path / "nowhere", tmp_path / "linked/a", tmp_path / "empty"):
        (tmp_path / "empty/folder").mkdir(parents=True, exist_ok=True)
        with pytest.raises(BadData, match=nothing.name):
            place.store.put(nothing)


def test_file_that_changes_while_it_is_stored(place: Place, model: Path, tmp_path: Path) -> None:
    def change(done: float, of: float, unit: str, note: str) -> None:
        with (model / "config.json").open("ab") as file:
            file.write(b" ")

    digest = digest_of(model, tmp_path / "elsewhere")
    with pytest.raises(BadData, match=r"config.json changed"):
        place.store.put(model, progress=change)
    assert not place.store.has(digest)


def test_check(place: Place) -> None:
    place.store.check()
    place.store.check()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "small"
    path.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", path], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"cannot mount a small disk: {mount.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def test_no_space_to_fetch(place: Place, tmp_path: Path, small_disk: Path) -> None:
    digest = place.store.put(write(tmp_path / "large", {"weights": os.urandom(3 << 20)}))
    with pytest.raises(NoSpace, match="no space"):
        place.store.fetch(digest, small_disk / "back")
    assert [path.name for path in small_disk.iterdir()] == ["back.fetched"]
    assert place.store.has(digest)


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
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
