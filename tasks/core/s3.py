"""Blobs in an S3 bucket (AWS, MinIO, Ceph, Swift ...), through boto3.

Credentials, region and endpoint come from boto3's own environment variables: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION, AWS_ENDPOINT_URL_S3. A server that does not know today's checksums wants
AWS_REQUEST_CHECKSUM_CALCULATION=when_required and AWS_RESPONSE_CHECKSUM_VALIDATION=when_required. The bucket should
end abandoned multipart uploads after some days (lifecycle rule AbortIncompleteMultipartUpload).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from boto3.exceptions import Boto3Error, RetriesExceededError
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, FlexibleChecksumError, HTTPClientError, SSLError
from botocore.exceptions import ConnectionError as NoConnection

from tasks.core.blobs import PROBE, Moved, disk
from tasks.core.errors import (
    BadConfig,
    Corrupted,
    Missing,
    NoSpace,
    StageError,
    StorageRefused,
    StorageUnavailable,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PART = 16 << 20
TRANSFER = TransferConfig(
    multipart_threshold=PART,
    multipart_chunksize=PART,  # s3transfer enlarges it where 10 000 parts would not do
    max_concurrency=8,
    preferred_transfer_client="classic",
)
MAY_PASS = {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "OperationAborted", "NoSuchUpload"}
BAD_TRANSFER = {"BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"}


class S3Blobs:
    """Blobs under `s3://bucket/prefix`. Not to be shared with a forked child."""

    def __init__(self, uri: str) -> None:
        self._bucket, _, prefix = uri.removeprefix("s3://").strip("/").partition("/")
        self._prefix = prefix + "/" if prefix else ""
        if not self._bucket:
            raise BadConfig(f"{uri}: no bucket; write s3://BUCKET/PREFIX")
        self.uri = f"s3://{self._bucket}" + (f"/{prefix}" if prefix else "")
        self._s3 = _client(attempts=None if "AWS_MAX_ATTEMPTS" in os.environ else 10)

    def size(self, key: str) -> int | None:
        """HEAD."""
        with self._asking(f"look for {key}"):
            try:
                return self._s3.head_object(**self._name(key))["ContentLength"]
            except ClientError as error:
                if _status(error) == 404:
                    return None
                raise

    def keys(self, prefix: str) -> Iterator[str]:
        """LIST, page by page: every key that starts with `prefix`, sorted."""
        with self._asking(f"list {prefix or 'all keys'}"):
            pages = self._s3.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
            for page in pages:
                yield from (found["Key"].removeprefix(self._prefix) for found in page.get("Contents", []))

    def read(self, key: str) -> bytes | None:
        """GET, into memory."""
        with self._asking(f"read {key}"):
            return self._read(self._s3, key)

    def write(self, key: str, data: bytes) -> None:
        """PUT."""
        with self._asking(f"write {key}"):
            self._s3.put_object(**self._name(key), Body=data)

    def upload(self, key: str, path: Path, sha256: str, moved: Moved) -> None:
        """PUT, in parts and in parallel for a large file; boto3 sends a CRC32 of every part, which S3 verifies."""
        name, extra = self._name(key), {"Metadata": {"sha256": sha256}}
        with disk(f"read {path}"), self._asking(f"upload {path.name} to {key}"):
            self._s3.upload_file(str(path), **name, ExtraArgs=extra, Callback=moved, Config=TRANSFER)

    def download(self, key: str, path: Path, moved: Moved) -> None:
        """GET, in ranges and in parallel for a large object."""
        with disk(f"write to {path.parent}"), self._asking(f"download {key}"):
            self._s3.download_file(**self._name(key), Filename=str(path), Callback=moved, Config=TRANSFER)

    def set_aside(self, key: str) -> None:
        """Copies on the server, and deletes."""
        with self._asking(f"set {key} aside"):
            self._s3.copy(self._name(key), **self._name(f"aside/{key}"), Config=TRANSFER)
            self._s3.delete_object(**self._name(key))

    def check(self) -> None:
        """Gives up after three tries: it is the start of a run, with a person watching."""
        key, data = PROBE
        with self._asking("write and read a tiny object"):
            probe = _client(attempts=3)
            probe.put_object(**self._name(key), Body=data)
            if self._read(probe, key) != data:
                raise StorageRefused(f"{self._where()} does not give back what was written to it: is it S3?")

    def _name(self, key: str) -> Any:  # the stubs want a TypedDict of their own for every call
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    def _read(self, s3: "S3Client", key: str) -> bytes | None:
        try:
            return s3.get_object(**self._name(key))["Body"].read()
        except s3.exceptions.NoSuchKey:
            return None

    def _where(self) -> str:
        return f"{self.uri} at {self._s3.meta.endpoint_url}"

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        try:
            yield
        except (ClientError, BotoCoreError, Boto3Error) as error:
            raise self._typed(error, f"cannot {what} in {self._where()}") from error

    def _typed(self, error: Exception, what: str) -> StageError:
        """`error` as what a retry policy and a person need to know."""
        cause = error
        if isinstance(error, RetriesExceededError):
            cause = error.last_exception  # type: ignore[attr-defined]  # missing in the stubs
        elif isinstance(error, Boto3Error) and isinstance(error.__context__, Exception):
            cause = error.__context__  # S3UploadFailedError keeps only the text of its cause
        what = f"{what}: {cause}"
        if isinstance(cause, ClientError):
            return self._answered(cause, what)
        if isinstance(cause, FlexibleChecksumError):
            return Corrupted(f"{what}. The bytes changed on their way; try again")
        if isinstance(cause, SSLError):
            return StorageRefused(f"{what}. Is it https? Set AWS_ENDPOINT_URL_S3, or its certificate: AWS_CA_BUNDLE")
        if isinstance(cause, (HTTPClientError, NoConnection, OSError)) or isinstance(error, RetriesExceededError):
            return StorageUnavailable(f"{what}. Is the server up, and AWS_ENDPOINT_URL_S3 right?")
        return StorageRefused(f"{what}. {CREDENTIALS}")  # no credentials, no region, a bad bucket name ...

    def _answered(self, error: ClientError, what: str) -> StageError:
        status, code = _status(error), error.response["Error"]["Code"]
        if status == 507:
            return NoSpace(f"{what}. The object store is full")
        if status >= 500 or status == 429 or code in MAY_PASS:
            return StorageUnavailable(what)
        if code in BAD_TRANSFER:
            return Corrupted(f"{what}. The bytes changed on their way; try again")
        if code in ("NoSuchKey", "404"):  # HEAD has no body, and so no code
            return Missing(what)
        if code == "NoSuchBucket":
            return StorageRefused(f"{what}. Create it: aws s3 mb s3://{self._bucket}")
        if code == "RequestTimeTooSkewed":
            return StorageRefused(f"{what}. Set this machine's clock")
        return StorageRefused(f"{what}. {CREDENTIALS}")


CREDENTIALS = (
    "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION and AWS_ENDPOINT_URL_S3; the key needs "
    "GetObject and PutObject on the bucket, and ListBucket (without it S3 answers 403 for an object that is not there)"
)


def _client(attempts: int | None) -> "S3Client":
    retries: dict[str, Any] = {"mode": "standard"} | ({"total_max_attempts": attempts} if attempts else {})
    own_endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    config = Config(
        retries=retries,  # type: ignore[arg-type]  # a TypedDict in the stubs
        connect_timeout=5,
        read_timeout=60,
        tcp_keepalive=True,
        max_pool_connections=16,
        s3={"addressing_style": "path" if own_endpoint else "auto"},
    )
    session = boto3.session.Session()  # boto3's default session is not safe for threads
    try:
        return session.client("s3", config=config)
    except (BotoCoreError, ValueError) as error:  # ValueError: the endpoint is not a URL
        raise StorageRefused(f"no S3 client: {error}. {CREDENTIALS}") from error


def _status(error: ClientError) -> int:
    return error.response["ResponseMetadata"]["HTTPStatusCode"]
