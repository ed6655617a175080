"""A real Prefect server on loopback, for tests."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx

from tests.waiting import wait_until


class PrefectServer:
    """Started once a session; `environment` makes clients and workers use it."""

    def __init__(self, home: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/api"
        self._log = home / "server.log"
        self.environment = {
            "PREFECT_API_URL": self.url,
            "PREFECT_HOME": str(home),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
            "DO_NOT_TRACK": "1",
        }
        self._port = port

    def start(self) -> None:
        """Returns when the API answers."""
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self._port)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, env=os.environ | self.environment, stdout=log, stderr=subprocess.STDOUT
            )
        wait_until(lambda: self._answers() or self._process.poll() is not None, 180, 0.3)
        if self._process.poll() is not None:
            raise RuntimeError(f"the Prefect server did not start:\n{self._log.read_text()}")

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=2).is_success
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        """SIGTERM, and waits for it."""
        self._process.terminate()
        self._process.wait(timeout=30)
