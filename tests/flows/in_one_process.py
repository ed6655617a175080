"""Several flows one after the other in one process, so that torch and MLflow are imported once.

python -m tests.flows.in_one_process audit.yaml quantize.yaml       # a config is named after its flow

Beside each config lies then what the flow returned: `audit.json`.
"""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

from flows.start import start


def run(config: Path) -> None:
    """As `python -m flows.<name> CONFIG`, which ends the process where it fails."""
    module, name = import_module(f"flows.{config.stem}"), config.stem
    flow = getattr(module, name)

    def show(summary: dict[str, Any]) -> None:
        module.show(summary)
        config.with_suffix(".json").write_text(json.dumps(summary))

    print(f"=== {name}", flush=True)
    sys.argv = [f"flows.{name}", str(config)]
    start(flow, get_type_hints(flow.fn)["config"], show)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        run(Path(argument))
