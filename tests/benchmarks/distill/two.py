"""Rows a second of our trainer on one GPU and on several of a host.

    python -m tests.benchmarks.distill.two                                                 one GPU
    python -m tasks.core.launch 2 tests.benchmarks.distill.two                             two, each with as many rows
    python -m tests.benchmarks.distill.two --rows 64 --micro 64                            fewer rows a GPU and step

Short rows; `--rows` are a GPU's of a step, each GPU asks its own teacher first.
"""

import argparse
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--micro", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--chunk", type=int, default=1280)
    parser.add_argument("--pico", action="store_true")
    arguments = parser.parse_args()
    from tasks.engine.distributed import ranks  # chooses this process's GPU before torch looks
    from tests.benchmarks.distill.ours import ours, states_of
    from tests.benchmarks.distill.shapes import PICO, SHAPES, SIZES, examples, say

    if arguments.pico:
        SHAPES.update(PICO)
        SIZES["vocabulary"] = 1024
    ranks.init_processes()
    count = ranks.world_size()
    rows = examples(2 * arguments.rows, False)
    with tempfile.TemporaryDirectory() as work:
        states, _ = states_of(rows, Path(work))
        run = ours(
            states, rows, arguments.steps, arguments.rows * count, arguments.micro, loss_chunk_mib=arguments.chunk
        )
    if ranks.rank() == 0:
        losses = run["history"].steps["loss"]
        note = f"median {run['median']:.2f} ms, losses {losses[0]:.4f} ... {losses[-1]:.4f}"
        say(
            f"{count} processes, {arguments.micro} rows at once",
            arguments.rows * count,
            run["ms"],
            rows,
            run["peak"],
            note,
        )
    ranks.end_processes()


if __name__ == "__main__":
    main()
