"""The seeds' whole job."""

from pathlib import Path

from tests.benchmarks.distill.ours import ours, states_of
from tests.benchmarks.distill.shapes import examples


def job(directory: Path, epochs: int = 2) -> None:
    """1 892 rows: the teacher once, then two epochs of 32 rows a step on its states."""
    rows = examples(1892, False)
    states, seconds = states_of(rows, directory)
    gib = states.starts[-1] * states.layout.bytes_per_label / 2**30
    print(
        f"| the teacher's pass over 1892 rows, {states.starts[-1]} labels, to disk ({gib:.2f} GiB) | {seconds:.2f} s |",
        flush=True,
    )
    for micro in (32, 16):
        run = ours(states, rows, 0, 32, micro, max_steps=None, epochs=epochs, loss_chunk_mib=512)
        times, steps = run["times"], len(run["times"])
        print(
            f"| {epochs} epochs, {steps} steps of 32 rows, {micro} at once | {times[-1] - times[0]:.2f} s from the "
            f"first step's end to the last's, {run['whole']:.2f} s with the first and its preparation | "
            f"{run['ms']:.1f} ms a step | {' | '.join(f'{part:.1f}' for part in run['peak'])} GiB |",
            flush=True,
        )
        del run
