"""The stage's own conversion of many models in one process, without the pipe that it usually stands behind.

python -m tests.gguf.ours ORDERS.json       # as in tests.gguf.oracle; sizes that were planned go to planned.json
"""

import json
import sys
from pathlib import Path
from typing import Any

from tasks.gguf.conversion_plan import make_plan
from tasks.gguf.convert import order_of, skeleton_of
from tasks.gguf.convert_child import described, write


def main(orders: list[dict[str, Any]]) -> None:
    from tasks.gguf.reference import Converted

    for order in orders:
        model, place, planned = Path(order["model"]), Path(order["model"]).parent, {}
        converted = Converted(model, "pico")
        skeleton = skeleton_of(described(converted), order["stored"])
        for kind in order["floats"] + order["kinds"]:
            plan = make_plan(skeleton, skeleton.wanted(kind))
            write(converted, order_of(plan, place / f"{kind}.ours"), lambda **_: None)
            planned[kind] = plan.bytes
        (place / "planned.json").write_text(json.dumps(planned))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
