"""Fixtures of more than one room."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import boto3
import pytest
from botocore.config import Config
from mypy_boto3_s3 import S3Client

from tests.prefect_server import PrefectServer
from tests.swift import KEY, SECRET, Swift

# What takes longest, longest first: so that two workers (`make test`) end at about the same time.
LONGEST = [
    "flows/test_pipeline.py",
    "flows/test_kill.py",
    "flows/test_other_flows.py",
    "deployments/test_deployments.py",
]

if "PYTEST_XDIST_WORKER" in os.environ:  # a thread a worker: torch's own would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, where there are several workers."""

    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(Path(__file__).parent).as_posix()
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=place)


class Bucket(NamedTuple):
    """A bucket of its own on a real S3 server: `uri` is a prefix in it, `client` a way behind the store's back."""

    uri: str
    name: str
    server: Swift
    client: S3Client


@pytest.fixture(scope="session")
def swift(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swift]:
    """A real S3 server on loopback. What cannot install or start it fails: object storage is never left untested."""
    server = Swift(tmp_path_factory.mktemp("swift"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def s3_client(swift: Swift) -> S3Client:
    return boto3.session.Session().client(
        "s3",
        endpoint_url=swift.endpoint,
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}, proxies={}),
    )


@pytest.fixture
def s3(swift: Swift, s3_client: S3Client, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A new bucket, and boto3's environment set to reach it with few retries."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**swift.environment, "AWS_MAX_ATTEMPTS": "2"}.items():
        monkeypatch.setenv(name, value)
    if not swift.running:  # a test that stopped it has failed
        swift.start()
    name = f"bucket-{uuid4().hex[:12]}"
    s3_client.create_bucket(Bucket=name)
    return Bucket(f"s3://{name}/team/stillhouse", name, swift, s3_client)


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """A real Prefect server on loopback."""
    server = PrefectServer(tmp_path_factory.mktemp("prefect"))
    server.start()
    yield server
    server.stop()
