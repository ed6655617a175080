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
from botocore.exceptions import ConnectionError as S3ConnectionError

from tasks.core.blobs import PROBE, OnBytes, disk_errors
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
TRANSIENT = {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "OperationAborted", "NoSuchUpload"}
CHECKSUM_ERRORS = {"BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"}


def open_blobs(uri: str) -> "S3Blobs":
    """The bucket and prefix that `uri` names; asks no server yet."""
    return S3Blobs(uri)


class S3Blobs:
    """Blobs under `s3://bucket/prefix`. Not to be shared with a forked child."""

    def __init__(self, uri: str) -> None:
        self._bucket, _, prefix = uri.removeprefix("s3://").strip("/").partition("/")
        self._prefix = prefix + "/" if prefix else ""
        if not self._bucket:
            raise BadConfig(f"{uri}: no bucket; write s3://BUCKET/PREFIX")
        self.uri = f"s3://{self._bucket}" + (f"/{prefix}" if prefix else "")
        self._client = _client(attempts=None if "AWS_MAX_ATTEMPTS" in os.environ else 10)

    def size(self, key: str) -> int | None:
        """HEAD: the object's length."""
        with self._typed_errors(f"look for {key}"):
            try:
                return self._client.head_object(**self._object(key))["ContentLength"]
            except ClientError as error:
                if _status(error) == 404:
                    return None
                raise

    def keys(self, prefix: str) -> Iterator[str]:
        """LIST, page by page: every key that starts with `prefix`, sorted."""
        with self._typed_errors(f"list {prefix or 'all keys'}"):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
            for page in pages:
                yield from (item["Key"].removeprefix(self._prefix) for item in page.get("Contents", []))

    def read(self, key: str) -> bytes | None:
        """GET, into memory."""
        with self._typed_errors(f"read {key}"):
            return self._read(self._client, key)

    def write(self, key: str, data: bytes) -> None:
        """PUT."""
        with self._typed_errors(f"write {key}"):
            self._client.put_object(**self._object(key), Body=data)

    def upload(self, key: str, path: Path, sha256: str, on_bytes: OnBytes) -> None:
        """PUT, in parts and in parallel for a large file; boto3 sends a CRC32 of every part, which S3 verifies."""
        extra = {"Metadata": {"sha256": sha256}}
        with disk_errors(f"read {path}"), self._typed_errors(f"upload {path.name} to {key}"):
            self._client.upload_file(
                str(path), **self._object(key), ExtraArgs=extra, Callback=on_bytes, Config=TRANSFER
            )

    def download(self, key: str, path: Path, on_bytes: OnBytes) -> None:
        """GET, in ranges and in parallel for a large object."""
        with disk_errors(f"write to {path.parent}"), self._typed_errors(f"download {key}"):
            self._client.download_file(**self._object(key), Filename=str(path), Callback=on_bytes, Config=TRANSFER)

    def set_aside(self, key: str) -> None:
        """Copies on the server, and deletes."""
        with self._typed_errors(f"set {key} aside"):
            self._client.copy(self._object(key), **self._object(f"aside/{key}"), Config=TRANSFER)
            self._client.delete_object(**self._object(key))

    def check(self) -> None:
        """Gives up after three tries: it is the start of a run, with a person watching."""
        key, data = PROBE
        with self._typed_errors("write and read a tiny object"):
            probe = _client(attempts=3)
            probe.put_object(**self._object(key), Body=data)
            if self._read(probe, key) != data:
                raise StorageRefused(f"{self._location()} does not give back what was written to it: is it S3?")

    def _object(self, key: str) -> Any:  # the stubs want a TypedDict of their own for every call
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    def _read(self, client: "S3Client", key: str) -> bytes | None:
        try:
            return client.get_object(**self._object(key))["Body"].read()
        except client.exceptions.NoSuchKey:
            return None

    def _location(self) -> str:
        return f"{self.uri} at {self._client.meta.endpoint_url}"

    @contextmanager
    def _typed_errors(self, action: str) -> Iterator[None]:
        try:
            yield
        except (ClientError, BotoCoreError, Boto3Error) as error:
            raise self._stage_error(error, f"cannot {action} in {self._location()}") from error

    def _stage_error(self, error: Exception, message: str) -> StageError:
        """The typed error for one of boto3's; `message` says what could not be done."""
        cause = error
        if isinstance(error, RetriesExceededError):
            cause = error.last_exception  # type: ignore[attr-defined]  # missing in the stubs
        elif isinstance(error, Boto3Error) and isinstance(error.__context__, Exception):
            cause = error.__context__  # S3UploadFailedError keeps only the text of its cause
        message = f"{message}: {cause}"
        if isinstance(cause, ClientError):
            return self._response_error(cause, message)
        if isinstance(cause, FlexibleChecksumError):
            return Corrupted(f"{message}. The bytes changed on their way; try again")
        if isinstance(cause, SSLError):
            return StorageRefused(f"{message}. Is it https? Set AWS_ENDPOINT_URL_S3, or its certificate: AWS_CA_BUNDLE")
        if isinstance(cause, (HTTPClientError, S3ConnectionError, OSError)) or isinstance(error, RetriesExceededError):
            return StorageUnavailable(f"{message}. Is the server up, and AWS_ENDPOINT_URL_S3 right?")
        return StorageRefused(f"{message}. {CREDENTIALS}")  # no credentials, no region, a bad bucket name ...

    def _response_error(self, error: ClientError, message: str) -> StageError:
        """The typed error for a response of the server's."""
        status, code = _status(error), error.response["Error"]["Code"]
        if status == 507:
            return NoSpace(f"{message}. The object store is full")
        if status >= 500 or status == 429 or code in TRANSIENT:
            return StorageUnavailable(message)
        if code in CHECKSUM_ERRORS:
            return Corrupted(f"{message}. The bytes changed on their way; try again")
        if code in ("NoSuchKey", "404"):  # HEAD has no body, and so no code
            return Missing(message)
        if code == "NoSuchBucket":
            return StorageRefused(f"{message}. Create it: aws s3 mb s3://{self._bucket}")
        if code == "RequestTimeTooSkewed":
            return StorageRefused(f"{message}. Set this machine's clock")
        return StorageRefused(f"{message}. {CREDENTIALS}")


CREDENTIALS = (
    "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION and AWS_ENDPOINT_URL_S3; the key needs "
    "GetObject and PutObject on the bucket, and ListBucket (without it S3 answers 403 for an object that is not there)"
)


def _client(attempts: int | None) -> "S3Client":
    retries: dict[str, Any] = {"mode": "standard"} | ({"total_max_attempts": attempts} if attempts else {})
    custom_endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    config = Config(
        retries=retries,  # type: ignore[arg-type]  # a TypedDict in the stubs
        connect_timeout=5,
        read_timeout=60,
        tcp_keepalive=True,
        max_pool_connections=16,
        s3={"addressing_style": "path" if custom_endpoint else "auto"},
    )
    session = boto3.session.Session()  # boto3's default session is not safe for threads
    try:
        return session.client("s3", config=config)
    except (BotoCoreError, ValueError) as error:  # ValueError: the endpoint is not a URL
        raise StorageRefused(f"no S3 client: {error}. {CREDENTIALS}") from error


def _status(error: ClientError) -> int:
    return error.response["ResponseMetadata"]["HTTPStatusCode"]
