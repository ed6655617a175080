"""Checks this machine, and a config against it, without training anything.

stillhouse doctor my.yaml
"""

import sys
from importlib import import_module
from typing import get_type_hints

from rich.console import Console

from flows.checks import idle
from flows.flow_config import FlowConfig
from flows.preflight import preflight, render
from flows.start import read_config
from tasks.core.errors import StageError
from tasks.core.settings import Settings
from tasks.preflight import Check


def main(source: str | None, flow: str) -> None:
    """The command; exits with 1 when a run would fail, and with what went wrong."""
    try:
        config = read_config(_config_class(flow), source) if source else None
        checks = preflight(config, Settings())
    except (ValueError, OSError, StageError) as error:
        sys.exit(f"stillhouse: {error}")
    checks += [Check("setting", "warn", text) for text in (idle(config) if config else [])]
    render(checks, Console(width=max(Console().width, 110)))
    failed = sum(check.state == "fail" for check in checks)
    if failed:
        sys.exit(f"stillhouse: {failed} of {len(checks)} checks failed")
    print("Ready." if source is None else f"Ready: stillhouse {'run' if flow == 'pipeline' else flow} {source}")


def _config_class(flow: str) -> type[FlowConfig]:
    if flow not in ("pipeline", "quantize", "audit", "bakeoff", "ablation"):
        raise ValueError(f"there is no flow {flow!r}: give pipeline, quantize, audit, bakeoff or ablation")
    config: type[FlowConfig] = get_type_hints(getattr(import_module(f"flows.{flow}"), flow).fn)["config"]
    return config
