"""Starts a flow by hand: `python -m flows.<name> CONFIG.yaml`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from prefect.settings import temporary_settings

from flows.flow_config import FlowConfig
from tasks.core.errors import StageError

C = TypeVar("C", bound=FlowConfig)
# For the temporary server that Prefect starts where no PREFECT_API_URL is set; the environment and the profile win.
SERVER_DEFAULTS = {
    # A slot held by a run that was killed comes free by its lease, even if the server was killed with it.
    "server.concurrency.lease_storage": "prefect.server.concurrency.lease_storage.filesystem",
    # It takes about 12 s to start on two idle cores, and more on busy ones; Prefect's default is 20.
    "server.ephemeral.startup_timeout_seconds": 180,
}


def start(flow: Callable[[C], dict[str, Any]], config: type[C], show: Callable[[dict[str, Any]], None]) -> None:
    """Runs `flow` on the config file that the command line names, and shows its summary; exits with what went wrong."""
    if len(sys.argv) != 2:
        name = Path(sys.argv[0]).stem
        sys.exit(f"usage: python -m flows.{name} CONFIG.yaml   (presets: deployments/presets/)")
    try:
        with temporary_settings(set_defaults=SERVER_DEFAULTS):
            show(flow(config.load(Path(sys.argv[1]))))
    except (ValueError, OSError, StageError) as error:
        sys.exit(f"stillhouse: {error}")
