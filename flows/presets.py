"""Presets: short YAML files that say what differs from the defaults. A config starts from one with `preset: NAME`."""

from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

import yaml


def preset_names() -> list[str]:
    """Every preset, of whatever flow."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _directory().iterdir() if entry.name.endswith(".yaml"))


def read_preset(name: str) -> dict[str, Any]:
    """A preset's settings, on top of those of the preset that it starts from. Raises ValueError for an unknown name."""
    if name not in preset_names():
        raise ValueError(f"preset: there is no {name!r}; there are {', '.join(preset_names())}")
    settings_of_file: dict[str, Any] = yaml.safe_load(preset_text(name))
    settings = read_preset(settings_of_file.pop("preset")) if "preset" in settings_of_file else {}
    for key, value in settings_of_file.items():
        below = settings.get(key)
        settings[key] = {**below, **value} if isinstance(below, dict) and isinstance(value, dict) else value
    return settings


def preset_text(name: str) -> str:
    """The file as it is, comments included."""
    return (_directory() / f"{name}.yaml").read_text(encoding="utf-8")


def _directory() -> Traversable:
    return files("deployments") / "presets"
