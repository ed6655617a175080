"""Starts a flow by hand: `python -m flows.<name> CONFIG.yaml`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from flows.config import FlowConfig
from tasks.core.errors import StageError

C = TypeVar("C", bound=FlowConfig)


def start(flow: Callable[[C], dict[str, Any]], config: type[C], show: Callable[[dict[str, Any]], None]) -> None:
    """Runs `flow` on the config file that the command line names, and shows its summary; exits with what went wrong."""
    if len(sys.argv) != 2:
        name = Path(sys.argv[0]).stem
        sys.exit(f"usage: python -m flows.{name} CONFIG.yaml   (presets: deployments/presets/)")
    try:
        show(flow(config.load(Path(sys.argv[1]))))
    except (ValueError, OSError, StageError) as error:
        sys.exit(f"stillhouse: {error}")
