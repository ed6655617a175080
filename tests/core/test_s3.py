"""What only an S3 server can do wrong, on a real one."""

import http.server
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.core import store as store_module
from tasks.core.errors import Corrupted, StorageRefused, StorageUnavailable
from tasks.core.store import open_store
from tests.conftest import Bucket
from tests.swift import Swift


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_bytes(b"{}")
    (directory / "model.safetensors").write_bytes(os.urandom(40 << 20))
    return directory


def test_objects_carry_their_sha256_and_large_ones_have_parts(s3: Bucket, model: Path) -> None:
    store = open_store(s3.uri)
    digest = store.put(model)
    for file in store.manifest(digest).files:
        head = s3.client.head_object(Bucket=s3.name, Key=f"team/stillhouse/{file.key}")
        assert head["Metadata"] == {"sha256": file.sha256}
        assert ("-3" in head["ETag"]) == (file.name == "model.safetensors")
    keys = [item["Key"] for item in s3.client.list_objects_v2(Bucket=s3.name)["Contents"]]
    assert all(key.startswith("team/stillhouse/") for key in keys)
    other = open_store(f"s3://{s3.name}/")  # no prefix, another store
    assert not other.has(digest)
    assert other.put(model) == digest


def test_rot_on_the_servers_disk(s3: Bucket, tmp_path: Path) -> None:
    store, directory, secret = open_store(s3.uri), tmp_path / "artifact", os.urandom(5000)
    directory.mkdir()
    (directory / "weights").write_bytes(secret)
    digest = store.put(directory)
    stored = next(path for path in s3.server.objects() if path.read_bytes() == secret)
    with stored.open("r+b") as file:
        file.write(bytes([secret[0] ^ 1]))
    with pytest.raises(Corrupted, match="weights"):
        store.fetch(digest, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert not store.has(digest)
    store.put(directory)
    assert (store.fetch(digest, tmp_path / "back") / "weights").read_bytes() == secret


@pytest.mark.parametrize(
    ("name", "value"),
    [("AWS_SECRET_ACCESS_KEY", "wrong"), ("AWS_ACCESS_KEY_ID", "no:body"), ("AWS_ACCESS_KEY_ID", None)],
)
def test_wrong_credentials(
    s3: Bucket, model: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str | None, tmp_path: Path
) -> None:
    digest = open_store(s3.uri).put(model)
    if value:
        monkeypatch.setenv(name, value)
    else:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    store = open_store(s3.uri)
    for use in (
        store.check,
        lambda: store.put(model),
        lambda: store.has(digest),
        lambda: store.fetch(digest, tmp_path / "back"),
        lambda: store.write_index("a", "b", {}),
    ):
        with pytest.raises(StorageRefused, match="AWS_SECRET_ACCESS_KEY") as caught:
            use()
        assert s3.uri in str(caught.value)


def test_unknown_bucket(s3: Bucket, model: Path) -> None:
    store = open_store("s3://no-such-bucket-here/prefix")
    for use in (store.check, lambda: store.put(model), lambda: store.has("0" * 64)):
        with pytest.raises(StorageRefused, match="aws s3 mb s3://no-such-bucket-here"):
            use()
    with pytest.raises(StorageRefused, match="Invalid bucket name"):
        open_store("s3://not a bucket/prefix").check()


@pytest.fixture
def every_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress at every chunk instead of twice a second."""
    monkeypatch.setattr(store_module, "REPORT_SECONDS", -1)


def stopping(server: Swift, when: str) -> Callable[[float, float, str, str], None]:
    """A progress that stops the server in the middle of the second file."""

    def progress(completed: float, total: float, unit: str, note: str) -> None:
        if note == when and server.running and completed > 0.1:
            server.stop()

    return progress


@pytest.mark.usefixtures("every_report")
def test_server_that_stops_in_the_middle_of_an_upload(s3: Bucket, model: Path, tmp_path: Path) -> None:
    store, sent = open_store(s3.uri), []

    def record(completed: float, total: float, unit: str, note: str) -> None:
        if note == "storing":
            sent.append(total)

    with pytest.raises(StorageUnavailable, match=s3.server.endpoint):
        store.put(model, progress=stopping(s3.server, "storing"))
    assert not s3.server.running
    with pytest.raises(StorageUnavailable, match="AWS_ENDPOINT_URL_S3"):
        store.check()
    s3.server.start()
    digest = store.put(model, progress=record)
    assert sent[-1] == (40 << 20) / 1e6  # config.json is there already: only the large file is sent again
    assert store.has(digest)
    assert (store.fetch(digest, tmp_path / "back") / "config.json").read_bytes() == b"{}"


@pytest.mark.usefixtures("every_report")
def test_server_that_stops_in_the_middle_of_a_download(s3: Bucket, model: Path, tmp_path: Path) -> None:
    store = open_store(s3.uri)
    digest = store.put(model)

    with pytest.raises(StorageUnavailable, match=s3.server.endpoint):
        store.fetch(digest, tmp_path / "back", progress=stopping(s3.server, "fetching"))
    assert [path.name for path in tmp_path.glob("back*")] == ["back.fetched"]
    s3.server.start()
    weights = store.fetch(digest, tmp_path / "back") / "model.safetensors"
    assert weights.read_bytes() == (model / "model.safetensors").read_bytes()


def test_endpoint_where_nothing_listens(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
    begin = time.monotonic()
    with pytest.raises(StorageUnavailable, match=f"127.0.0.1:{port}"):
        open_store(s3.uri).check()
    assert time.monotonic() - begin < 10
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "not a url")
    with pytest.raises(StorageRefused, match="Invalid endpoint"):
        open_store(s3.uri)


class Page(http.server.BaseHTTPRequestHandler):
    """A server that is no object store: 200 and a page, whatever it is asked; or the status in the path."""

    status = 200

    def do_GET(self) -> None:  # noqa: N802
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(self.status)
        self.send_header("Content-Length", "13")
        self.end_headers()
        self.wfile.write(b"<html></html>")

    do_PUT = do_HEAD = do_POST = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [(200, StorageRefused, "is it S3"), (503, StorageUnavailable, "503"), (405, StorageRefused, "AWS_ENDPOINT_URL_S3")],
)
def test_endpoint_that_is_not_s3(
    s3: Bucket, monkeypatch: pytest.MonkeyPatch, status: int, error: type[Exception], words: str
) -> None:
    handler = type("Handler", (Page,), {"status": status})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(error, match=words):
            open_store(s3.uri).check()
        server.shutdown()
