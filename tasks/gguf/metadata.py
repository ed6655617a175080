"""Provenance in a GGUF's metadata: config, commit, library versions and the lineage of model and dataset.

python -m tasks.gguf.metadata model.gguf
"""

import json
import sys
from pathlib import Path
from typing import Any

from tasks.core.provenance import commit, libraries
from tasks.gguf import GgufConfig
from tasks.gguf.header import read_header


def provenance_values(config: GgufConfig, model: Path, dataset: Path | None) -> dict[str, str]:
    """The `stillhouse.*` values as JSON: config, commit, libraries, and the provenance of the inputs.

    The model's lineage names the merge, the student, its teacher and their data.
    """
    values: dict[str, Any] = {
        "stillhouse.config": config.model_dump(mode="json"),
        "stillhouse.libraries": libraries(),
        "stillhouse.inputs": {"model": model.name, "dataset": dataset.name if dataset else None},
        "stillhouse.model": _provenance(model),
        "stillhouse.dataset": _provenance(dataset) if dataset else None,
    }
    encoded = {key: json.dumps(value, sort_keys=True) for key, value in values.items() if value is not None}
    return {"stillhouse.commit": commit(), **encoded}


def read_provenance(file: Path) -> dict[str, str]:
    """The `stillhouse.*` values of a GGUF."""
    header = read_header(file)
    return {name: header.get(name) for name in header.values if name.startswith("stillhouse.")}


def _provenance(directory: Path) -> dict[str, Any] | None:
    """The `provenance.json` of the stage that wrote `directory`, with those of its inputs inside; None without one."""
    file = directory / "provenance.json"
    return json.loads(file.read_text()) if file.is_file() else None


if __name__ == "__main__":
    for name, value in read_provenance(Path(sys.argv[1])).items():
        print(f"{name}: {value}")
