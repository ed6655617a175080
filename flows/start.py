"""Starts a flow by hand: `python -m flows.<name> CONFIG.yaml`, or `stillhouse <name> CONFIG.yaml`."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from prefect.settings import temporary_settings

from flows.flow_config import FlowConfig
from flows.presets import preset_names
from tasks.core.errors import StageError

C = TypeVar("C", bound=FlowConfig)
# For the temporary server that Prefect starts where no PREFECT_API_URL is set; the environment and the profile win.
SERVER_DEFAULTS = {
    # A slot held by a run that was killed comes free by its lease, even if the server was killed with it.
    "server.concurrency.lease_storage": "prefect.server.concurrency.lease_storage.filesystem",
    # It takes about 12 s to start on two idle cores, and more on busy ones; Prefect's default is 20.
    "server.ephemeral.startup_timeout_seconds": 180,
    "server.analytics_enabled": False,  # nothing of a run leaves the machine
}


def start(flow: Callable[[C], dict[str, Any]], config: type[C], show: Callable[[dict[str, Any]], None]) -> None:
    """Runs `flow` on the config file that the command line names, and shows its summary; exits with what went wrong."""
    if len(sys.argv) != 2:
        name = Path(sys.argv[0]).stem
        sys.exit(f"usage: python -m flows.{name} CONFIG.yaml   (or a preset's name: {', '.join(preset_names())})")
    run(flow, config, show, sys.argv[1])


def run(
    flow: Callable[[C], dict[str, Any]],
    config: type[C],
    show: Callable[[dict[str, Any]], None],
    source: str,
    changes: Sequence[str] = (),
) -> None:
    """Runs `flow` on a config file or preset with `changes` (`student.rank=8`); exits with what went wrong."""
    try:
        settings = read_config(config, source, changes)
        with temporary_settings(set_defaults=SERVER_DEFAULTS):
            show(flow(settings))
    except (ValueError, OSError, StageError) as error:
        sys.exit(f"stillhouse: {error}")


def read_config(config: type[C], source: str, changes: Sequence[str] = ()) -> C:
    """The config of a YAML file, or of a preset where no file has that name. Raises ValueError with the field."""
    path = Path(source)
    is_preset = source in preset_names() and (path.is_dir() or not path.exists())
    if not changes and not is_preset and path.exists():
        return config.load(path)
    settings = {"preset": source} if is_preset else _read(path)
    for change in changes:
        _apply(settings, change)
    return config.checked(settings, source)


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is neither a file nor a preset ({', '.join(preset_names())})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings: write one a line, as in `train: data/train.jsonl`")
    return settings


def _apply(settings: dict[str, Any], change: str) -> None:
    path, equals, value = change.partition("=")
    if not equals:
        raise ValueError(f"--set {change}: write it as setting=value, as in --set student.rank=8")
    *groups, name = path.split(".")
    for group in groups:
        settings[group] = dict(settings.get(group) or {})
        settings = settings[group]
    try:
        settings[name] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {change}: the value is not YAML: {error}") from error
