"""Runs the stage's conversion of many models in one process, without the child process and its pipe.

python -m tests.gguf.stage_conversion ORDERS.json       # as in oracle_conversion; planned sizes go to planned.json
"""

import json
import sys
from pathlib import Path
from typing import Any

from tasks.gguf.conversion_plan import make_plan
from tasks.gguf.convert import parse_layout, write_request
from tasks.gguf.convert_child import describe, write


def main(orders: list[dict[str, Any]]) -> None:
    from tasks.gguf.hf_converter import HfModel

    for order in orders:
        model, parent, sizes = Path(order["model"]), Path(order["model"]).parent, {}
        converted = HfModel(model, "pico")
        layout = parse_layout(describe(converted), order["stored"])
        for kind in order["floats"] + order["kinds"]:
            plan = make_plan(layout, layout.options(kind))
            write(converted, write_request(plan, parent / f"{kind}.stage"), lambda **_: None)
            sizes[kind] = plan.bytes
        (parent / "planned.json").write_text(json.dumps(sizes))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
