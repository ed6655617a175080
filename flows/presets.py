"""Presets: short YAML files that say what differs from the defaults. A config starts from one with `preset: NAME`."""

from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

import yaml


def preset_names() -> list[str]:
    """Every preset, of whatever flow."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _directory().iterdir() if entry.name.endswith(".yaml"))


def read_preset(name: str) -> dict[str, Any]:
    """A preset's settings. Raises ValueError for a name that is none."""
    if name not in preset_names():
        raise ValueError(f"preset: there is no {name!r}; there are {', '.join(preset_names())}")
    settings: dict[str, Any] = yaml.safe_load(preset_text(name))
    return settings


def preset_text(name: str) -> str:
    """The file as it is, comments included."""
    return (_directory() / f"{name}.yaml").read_text(encoding="utf-8")


def _directory() -> Traversable:
    return files("deployments") / "presets"
