"""One GPU against several of one host: rows a second and losses of the same run of the Gemma-3-1B or 4B shape.

    python -m tests.benchmarks.processes checkpoint DIR [--shape 4B]        random weights, once
    python -m tests.benchmarks.processes run DIR [ddp|fsdp2] [lora|full] [--rows 32] [--micro 8] [--compile on]
    python -m tasks.core.launch 2 tests.benchmarks.processes run DIR ddp lora --rows 64
    python -m tests.benchmarks.processes table DIR [--only NAME ...]        those of RUNS, and a table of them

`--rows` are a step's over all processes. Speed is the median step after five, of 16, each from synchronize to
synchronize; rows of 1024 tokens, every token but the first with a label. In the table the runs warm up side by side and
take their other steps one run after another (turns.py).
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tests.benchmarks.turns import end_turn, take_turns, wait_for_turn

WARM_UP = 5
# name: processes, and what `run` is asked
RUNS = {
    "1 GPU": (1, "ddp lora --rows 32 --compile on"),
    "2 GPUs, ddp": (2, "ddp lora --rows 64 --compile on"),
    "2 GPUs, fsdp2": (2, "fsdp2 lora --rows 64 --compile on"),
    "1 GPU, 32 at once": (1, "ddp lora --rows 32 --micro 32 --compile on"),
    "2 GPUs, fsdp2, 32 at once": (2, "fsdp2 lora --rows 64 --micro 32 --compile on"),
    "1 GPU, all weights": (1, "ddp full --rows 32 --compile on"),
    "2 GPUs, all weights, ddp": (2, "ddp full --rows 64 --compile on"),
    "2 GPUs, all weights, fsdp2": (2, "fsdp2 full --rows 64 --compile on"),
    "1 GPU, all weights, 32 at once": (1, "ddp full --rows 32 --micro 32 --compile on"),
    "2 GPUs, all weights, fsdp2, 32 at once": (2, "fsdp2 full --rows 64 --micro 32 --compile on"),
    "1 GPU, 4B": (1, "ddp lora --rows 16 --shape 4B --recompute --compile on"),
    "2 GPUs, 4B, fsdp2": (2, "fsdp2 lora --rows 32 --shape 4B --recompute --compile on"),
}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("act", choices=["checkpoint", "run", "table"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("strategy", nargs="?", default="ddp", choices=["ddp", "fsdp2"])
    parser.add_argument("method", nargs="?", default="lora", choices=["lora", "full"])
    parser.add_argument("--shape", default="1B", choices=["1B", "4B"])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--compile", default="off")
    parser.add_argument("--pico", action="store_true")
    parser.add_argument("--name", help="of this run in a table")
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=RUNS)
    parser.add_argument("--patience", type=float, default=150)
    arguments = parser.parse_args()
    if arguments.act == "table":
        table(arguments.directory, arguments.only, arguments.patience, arguments.pico)
        return
    import torch

    from tasks.engine.distributed import ranks
    from tasks.engine.models.trainable import trainable_model
    from tasks.engine.training.spec import TrainingSpec
    from tasks.teacher.run import objective
    from tests.benchmarks.memory import Case, UnsavedLoop, base_of, config_of

    if arguments.act == "checkpoint":
        base_of(arguments.shape, arguments.directory, arguments.pico)
        return
    ranks.init_processes()
    case = Case(arguments.shape, arguments.method, arguments.rows, arguments.length, arguments.recompute)
    more = {
        "micro_batch_size": arguments.micro,
        "max_steps": arguments.steps,
        "learning_rate": 1e-4,
        "compile": arguments.compile,
    }
    config, base = config_of(case, **more), ModelDir(arguments.directory / arguments.shape)
    rows = rows_of(arguments.rows * arguments.steps, arguments.length, 512 if arguments.pico else 262144)
    with tempfile.TemporaryDirectory() as work:
        device, loss = "cuda" if torch.cuda.is_available() else "cpu", objective(config.loss_chunk_mib << 20)
        spec = TrainingSpec(
            lambda: trainable_model(config, arguments.method, base, device), rows, [], loss, config, Job(Path(work)),
            "benchmark", strategy=arguments.strategy,
            before_step=lambda _, step: warm(arguments.directory, arguments.name, step) if arguments.name else None,
        )  # fmt: skip
        start = time.time()
        loop = UnsavedLoop(spec)
        loop.run()
    if ranks.rank() == 0:
        told: dict[str, Any] = {
            "processes": ranks.world_size(),
            "strategy": arguments.strategy if ranks.world_size() > 1 else "-",
            "method": arguments.method,
            "shape": arguments.shape,
            "rows": arguments.rows,
            "at_once": arguments.micro,
            "losses": [round(loss, 5) for loss in loop.history.steps["loss"]],
            "seconds": round(time.time() - start, 1),
            **{name: float(f"{value:.5g}") for name, value in loop.reporter.meter.summary().items()},
        }
        print(json.dumps(told), flush=True)
        if arguments.name:
            (arguments.directory / f"{arguments.name}.json").write_text(json.dumps(told))
            end_turn(arguments.directory, arguments.name)
    sys.stdout.flush()
    ranks.end_processes()


def warm(directory: Path, name: str, step: int) -> None:
    """Before the first timed step: until it is this run's turn, in all of its processes."""
    from tasks.engine.distributed import ranks

    if step == WARM_UP:
        ranks.barrier()
        wait_for_turn(directory, name)


def table(directory: Path, names: list[str], patience: float, pico: bool) -> None:
    """The runs of `names`, and their speed beside the first of their shape and method with as many rows at once."""

    def command(name: str) -> list[str]:
        count, asked = RUNS[name]
        start = ["tests.benchmarks.processes"] if count == 1 else ["tasks.core.launch", str(count)]
        rest = ["tests.benchmarks.processes"] if count > 1 else []
        strategy, method, *more = asked.split()
        small = ["--pico", "--length", "64"] * pico
        where = ["run", str(directory), strategy, method, "--name", name, *small]
        return [sys.executable, "-m", *start, *rest, *where, *more]

    take_turns(directory, names, command, patience, stop=False)
    alone: dict[tuple[str, str, int], float] = {}
    print("| | rows/s | tokens/s | peak GiB a card | times one GPU | last loss |\n|---|---|---|---|---|---|")
    for name in names:
        if not (directory / f"{name}.json").exists():
            print(f"{name} failed:\n{(directory / f'{name}.log').read_text()[-1500:]}")
            continue
        told = json.loads((directory / f"{name}.json").read_text())
        speed, tokens = told["rows_per_second"], told["tokens_per_second"]
        times = speed / alone.setdefault((told["shape"], told["method"], told["at_once"]), speed)
        peak = told.get("peak_gib", 0)
        print(f"| {name} | {speed:.1f} | {tokens:,.0f} | {peak:.1f} | {times:.2f} | {told['losses'][-1]} |")


def rows_of(count: int, length: int, vocabulary: int) -> list[Any]:
    """Rows in which some tokens follow others, so that there is something to learn."""
    import torch

    from tasks.engine.data.chat_template import IGNORE, Example

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, min(vocabulary, 500), (count, length), generator=generator)
    ids[:, 1::2] = (ids[:, 0::2] * 7 + 3) % min(vocabulary, 500)
    return [Example(row, [IGNORE, *row[1:]]) for row in ids.tolist()]


if __name__ == "__main__":
    main()
