"""One GPU against several of one host: rows a second and losses of the same LoRA run of the Gemma-3-1B shape.

    python -m tests.benchmarks.processes checkpoint DIR          random weights, once
    python -m tests.benchmarks.processes run DIR [ddp|fsdp2] [lora|full] [--rows 32] [--micro 8] [--compile on]
    python -m tasks.core.launch 2 tests.benchmarks.processes run DIR ddp lora --rows 64

`--rows` are a step's over all processes. Speed is the median step after five, of 24, each from synchronize to
synchronize; rows of 1024 tokens, every token but the first with a label.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tasks.core.job import Job
from tasks.core.refs import ModelDir


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("act", choices=["checkpoint", "run"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("strategy", nargs="?", default="ddp", choices=["ddp", "fsdp2"])
    parser.add_argument("method", nargs="?", default="lora", choices=["lora", "full"])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--compile", default="off")
    parser.add_argument("--pico", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    local = os.environ.get("LOCAL_RANK")
    if local is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = local  # as tasks.core.command does
    import torch

    from tasks.engine import processes
    from tasks.engine.plan import Plan
    from tasks.engine.trainable import trainable_model
    from tasks.teacher.run import objective
    from tests.benchmarks.memory import Case, Unsaved, base_of, config_of

    if arguments.act == "checkpoint":
        base_of("1B", arguments.directory, arguments.pico)
        return
    processes.join()
    case = Case("1B", arguments.method, arguments.rows, arguments.length, arguments.recompute)
    more = {
        "micro_batch_size": arguments.micro,
        "max_steps": arguments.steps,
        "learning_rate": 1e-4,
        "compile": arguments.compile,
    }
    config, base = config_of(case, **more), ModelDir(arguments.directory / "1B")
    rows = rows_of(arguments.rows * arguments.steps, arguments.length, 512 if arguments.pico else 262144)
    with tempfile.TemporaryDirectory() as work:
        device, loss = "cuda" if torch.cuda.is_available() else "cpu", objective(config.loss_chunk_mib << 20)
        plan = Plan(
            lambda: trainable_model(config, arguments.method, base, device), rows, [], loss, config, Job(Path(work)),
            "benchmark", rung=0, strategy=arguments.strategy,
        )  # fmt: skip
        start = time.time()
        trainer = Unsaved(plan, 1.0)
        trainer.train()
    if processes.rank() == 0:
        told: dict[str, Any] = {
            "processes": processes.count(),
            "strategy": arguments.strategy if processes.count() > 1 else "-",
            "method": arguments.method,
            "rows": arguments.rows,
            "losses": [round(loss, 5) for loss in trainer.history.steps["loss"]],
            "seconds": round(time.time() - start, 1),
            **{name: float(f"{value:.5g}") for name, value in trainer.reporter.finish().items()},
        }
        print(json.dumps(told), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(told))
    sys.stdout.flush()
    processes.leave()


def rows_of(count: int, length: int, vocabulary: int) -> list[Any]:
    """Rows in which some tokens follow others, so that there is something to learn."""
    import torch

    from tasks.engine.chat import IGNORE, Example

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, min(vocabulary, 500), (count, length), generator=generator)
    ids[:, 1::2] = (ids[:, 0::2] * 7 + 3) % min(vocabulary, 500)
    return [Example(row, [IGNORE, *row[1:]]) for row in ids.tolist()]


if __name__ == "__main__":
    main()
