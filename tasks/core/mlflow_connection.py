"""Calls to MLflow that never stop a run: one warning when the server fails, then no further calls."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

Warn = Callable[[str], None]


class MlflowConnection:
    """An MLflow client that is made on first use, and given up after its first failure."""

    def __init__(self, tracking_uri: str, warn: Warn) -> None:
        self.warn = warn
        self._uri = tracking_uri
        self._client: MlflowClient | None = None
        self._failed = False

    def call(self, action: "Callable[[MlflowClient], Any]", dispensable: bool = False) -> Any:
        """Runs `action(client)`; None, and a warning, when MLflow fails: then no later call reaches it.

        A `dispensable` action that MLflow refuses with 400 (a param that changed, say) is lost alone.
        """
        from boto3.exceptions import Boto3Error  # noqa: PLC0415  (what artifacts straight to S3 may raise)
        from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415
        from mlflow import MlflowClient  # noqa: PLC0415  (two seconds)
        from mlflow.exceptions import MlflowException  # noqa: PLC0415
        from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415

        failures = MlflowException, SQLAlchemyError, Boto3Error, BotoCoreError, ClientError, ImportError, OSError
        if self._failed:
            return None
        try:
            if self._client is None:
                self._client = MlflowClient(self._uri)
            return action(self._client)
        except failures as error:
            message = without_password(str(error))
            if dispensable and isinstance(error, MlflowException) and error.get_http_status_code() == 400:
                self.warn(f"MLflow refused to record something; the run goes on: {message}")
                return None
            self._failed = True
            self.warn(
                f"MLflow at {without_password(self._uri)} failed; the run goes on without it. "
                f"Once it works again, the same command records what was done. ({message})"
            )
            return None


def without_password(text: str) -> str:
    """`text` without the `user:password@` of its URLs, for messages and pages."""
    return re.sub(r"(\w+://)[^/@\s]*@", r"\1", text)
