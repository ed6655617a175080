"""A model or a GGUF file of a run, out of the store into a directory of yours.

stillhouse fetch latest Q4_K_M out/q4

A run is named as in `flows.compare`; without a name and a directory what it made is listed.
"""

import json
import sys
import tempfile
from pathlib import Path

from flows.compare import find_run
from tasks.core.errors import BadConfig, StageError
from tasks.core.settings import Settings
from tasks.core.store import open_store


def artifacts(run: str, settings: Settings) -> dict[str, str]:
    """What a run delivered: digests by name. Raises BadConfig where there is no such run."""
    with tempfile.TemporaryDirectory() as scratch:
        summary = json.loads((find_run(run, Path(scratch), settings) / "summary.json").read_text())
    digests: dict[str, str] = summary.get("artifacts", {})
    return digests


def fetch(run: str, name: str, target: Path, settings: Settings) -> Path:
    """Puts the files of `name` into the new directory `target`, every byte verified."""
    digests = artifacts(run, settings)
    if name not in digests:
        raise BadConfig(f"{run} made no {name!r}; it made {', '.join(digests) or 'nothing that was delivered'}")
    if target.exists():
        raise BadConfig(f"{target} is there already: give a directory that is not")
    open_store(settings.store_uri).fetch(digests[name], target)
    target.with_name(target.name + ".fetched").unlink()
    return target


def main(arguments: list[str]) -> None:
    """The command; exits with what went wrong."""
    if len(arguments) not in (1, 3):
        sys.exit("usage: stillhouse fetch RUN [NAME DIR]   (a name below .stillhouse/reports, or an MLflow run id)")
    settings = Settings()
    try:
        if len(arguments) == 1:
            print("\n".join(artifacts(arguments[0], settings)))
        else:
            print(fetch(arguments[0], arguments[1], Path(arguments[2]).absolute(), settings))
    except (StageError, ValueError, OSError) as error:
        sys.exit(f"stillhouse: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
