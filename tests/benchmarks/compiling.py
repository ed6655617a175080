"""What compiling decoder layers costs once and saves each micro-batch (constants of tasks.engine.speed.compile).

    python -m tests.benchmarks.compiling table DIR [--only NAME ...] [--pico]
    python -m tests.benchmarks.compiling run DIR NAME on|off [--pico]

Each case trains with and without, packed and replayed as CUDA graphs, each with empty caches of inductor and Triton.
All warm up side by side and take their timed steps one after another (turns.py). `costs` is how much longer the first
five steps took, `saves` the difference of the median of the others, a micro-batch each.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.turns import end_turn, take_turns, wait_for_turn

WARM_UP, STEPS = 5, 20
CASES = {
    "270M lora 4 x 256": ("270M", "lora", 4, 256, False),
    "270M lora 8 x 1024": ("270M", "lora", 8, 1024, False),
    "1B lora 2 x 512": ("1B", "lora", 2, 512, False),
    "1B lora 8 x 1024": ("1B", "lora", 8, 1024, False),
    "1B lora 8 x 1024, recompute": ("1B", "lora", 8, 1024, True),
    "1B qlora 8 x 1024, recompute": ("1B", "qlora", 8, 1024, True),
    "4B lora 1 x 1024, recompute": ("4B", "lora", 1, 1024, True),
    "4B lora 4 x 1024, recompute": ("4B", "lora", 4, 1024, True),
}


def run(directory: Path, name: str, compiled: str, pico: bool) -> None:
    """One case one way; writes its step times."""
    from tasks.core.job import Job
    from tasks.engine.models.trainable import trainable_model
    from tasks.engine.training.spec import TrainingSpec
    from tasks.teacher.run import objective
    from tests.benchmarks.memory import Case, UnsavedLoop, base_of, config_of, pick_device
    from tests.benchmarks.processes import rows_of

    case, me = Case(*CASES[name]), f"{name}, {compiled}"
    config, base = config_of(case, max_steps=STEPS, compile=compiled), base_of(case.size, directory, pico)
    rows = rows_of(case.rows * STEPS, 64 if pico else case.length, 512 if pico else 262144)

    def wait(_: object, step: int) -> None:
        if step == WARM_UP:
            wait_for_turn(directory, me)

    with tempfile.TemporaryDirectory() as work:
        spec = TrainingSpec(
            lambda: trainable_model(config, case.method, base, pick_device()), rows, [],
            objective(config.loss_chunk_mib << 20), config, Job(Path(work)), "benchmark", before_step=wait,
        )  # fmt: skip
        loop = UnsavedLoop(spec)
        loop.run()
    seconds = loop.reporter.meter.seconds
    told = {"first": sum(seconds[:WARM_UP]), "step": statistics.median(seconds[WARM_UP + 3 :])}
    (directory / f"{me}.json").write_text(json.dumps(told))
    end_turn(directory, me)


def table(directory: Path, names: list[str], patience: float, pico: bool) -> None:
    """All cases, both ways."""
    from tests.benchmarks.memory import base_of, shape

    for size in dict.fromkeys(CASES[name][0] for name in names):
        base_of(size, directory, pico)
    both = [f"{name}, {way}" for name in names for way in ("on", "off")]
    with tempfile.TemporaryDirectory() as caches:

        def command(me: str) -> list[str]:
            name, _, way = me.rpartition(", ")
            own = [f"{kind}={caches}/{kind} {me}" for kind in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")]
            start = ["env", *own, sys.executable, "-m", "tests.benchmarks.compiling", "run", str(directory), name, way]
            return start + ["--pico"] * pico

        take_turns(directory, both, command, patience)
    print("| | layers | ms a micro-batch, as it is | compiled | saves ms | a layer | costs s | pays after |")
    print("|---|---|---|---|---|---|---|---|")
    for name in names:
        files = [directory / f"{name}, {way}.json" for way in ("on", "off")]
        if not all(file.exists() for file in files):
            print(f"{name} failed: {[(file.with_suffix('.log')).read_text()[-600:] for file in files]}")
            continue
        on, off = (json.loads(file.read_text()) for file in files)
        saves, layers = off["step"] - on["step"], shape(CASES[name][0]).num_hidden_layers
        costs = on["first"] - off["first"] + WARM_UP * saves
        print(
            f"| {name} | {layers} | {off['step'] * 1e3:.1f} | {on['step'] * 1e3:.1f} | {saves * 1e3:.1f} | "
            f"{saves / layers * 1e3:.2f} | {costs:.1f} | {costs / saves if saves > 0 else float('inf'):.0f} |"
        )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("table", "run"):
        own = commands.add_parser(command)
        own.add_argument("directory", type=Path)
        if command == "run":
            own.add_argument("name", choices=CASES)
            own.add_argument("compiled", choices=["on", "off"])
        else:
            own.add_argument("--only", nargs="*", default=list(CASES), choices=CASES)
            own.add_argument("--patience", type=float, default=150, help="seconds to warm up in")
        own.add_argument("--pico", action="store_true", help="tiny shapes, to try the script on a CPU")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    if arguments.command == "run":
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
        run(arguments.directory, arguments.name, arguments.compiled, arguments.pico)
    else:
        table(arguments.directory, arguments.only, arguments.patience, arguments.pico)


if __name__ == "__main__":
    main()
