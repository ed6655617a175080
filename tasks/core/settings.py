"""Directories, servers and limits of this machine, from environment variables only, never a flow's parameter.

`STILLHOUSE_HOME` (default `.stillhouse` in the working directory) holds the store, scratch space and MLflow's
database unless `STILLHOUSE_STORE` (`s3://bucket/prefix`) and `MLFLOW_TRACKING_URI` say otherwise. Credentials are
boto3's and MLflow's own variables.
"""

import os
import socket
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Settings from `STILLHOUSE_*`, read at each construction, so that a test or a worker can set them first."""

    model_config = SettingsConfigDict(env_prefix="STILLHOUSE_", frozen=True)

    home: Path = Path(".stillhouse")
    """Directory of the store, scratch space, inputs and MLflow's database on this machine."""
    store: str | None = None
    """The object store: `file:///...` or `s3://bucket/prefix`; default `<home>/store`."""
    gpu_slot: str = Field(default_factory=lambda: f"gpu-{socket.gethostname().lower()}")
    """Name of the global concurrency limit that a stage holds while its command runs."""
    gpu_slots: int = Field(default=1, ge=1)
    """How many stages may run at once on this host, used when the limit does not exist yet."""
    stall_seconds: float = Field(default=1800, gt=0)
    """A command whose log and events do not grow for so long is stopped, its stacks in its log, and tried again."""
    timeout_seconds: float = Field(default=7 * 24 * 3600, gt=0)
    """A command that runs longer is stopped."""
    warm_start: Literal["auto", "on", "off"] = "auto"
    """Fork stages off one process that has imported torch (tasks/core/fork_server.py); `auto` does so on machines
    without a CUDA device."""
    preflight: Literal["stop", "warn", "off"] = "stop"
    """What a failed check does before the first stage: stops the run, or only warns; `off` makes no checks."""
    keep_scratch: bool = False
    """Keep a finished stage's checkpoints and logs below `<home>/scratch`."""
    experiment: str = "stillhouse"
    """The MLflow experiment."""

    @cached_property
    def root(self) -> Path:
        """`home` as an absolute path; creates the directory."""
        root = self.home.expanduser().absolute()
        root.mkdir(parents=True, exist_ok=True)
        return root

    @property
    def warm(self) -> bool:
        """Whether stages are forked on this machine."""
        return self.warm_start == "on" or (self.warm_start == "auto" and not Path("/dev/nvidiactl").exists())

    @cached_property
    def store_uri(self) -> str:
        """The store's URI, with the default filled in."""
        return self.store or (self.root / "store").as_uri()

    @cached_property
    def tracking_uri(self) -> str:
        """MLflow's tracking URI: `MLFLOW_TRACKING_URI`, or a SQLite file below `home`."""
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.root / 'mlflow.db'}"
