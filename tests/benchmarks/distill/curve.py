"""Validation KL by wall time."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tasks.engine.data.chat_template import Example
from tasks.engine.training.validation import validation_losses
from tests.benchmarks.distill.ours import ours, states_of
from tests.benchmarks.distill.peers import peer_steps
from tests.benchmarks.distill.shapes import DEVICE, examples, fresh, model, sync

RATE = 1e-4
PIECES = 500  # so that a token comes by often enough for what the teacher says after it to be learnt


def curve(out: Path, directory: Path, steps: int = 16) -> None:
    """Validation KL by wall time: everybody from the same weights, each row once, 32 a step; a picture and JSON."""
    rows, held = examples(steps * 32, False, pieces=PIECES), examples(64, False, seed=2, pieces=PIECES)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    states, _ = states_of([*rows, *held], directory)
    found: dict[str, list[tuple[float, float]]] = {}
    few: dict[str, Any] = dict(validation=held, loss_chunk_mib=512, learning_rate=RATE)
    spec = ours(states, rows, 4, 32, 32, **few)["spec"]

    def measured(student: Any) -> float:
        return validation_losses(spec, student)["kd_loss"]

    # Ours runs once whole for its clock, and once more with a look at the student after every second step.
    run = ours(states, rows, steps, 32, 32, **few)
    times = [0.0, *(t - run["times"][0] + run["ms"] / 1e3 for t in run["times"])]
    looked = ours(states, rows, steps, 32, 32, **few, validate_every_steps=2)
    at = [int(step) for step in looked["history"].validation["step"]]
    values = [*looked["history"].validation["kd_loss"], measured(looked["model"])]
    start = measured(model("student", torch.float32))
    found["ours"] = [(0.0, start), *((times[step], kl) for step, kl in zip([*at, steps], values, strict=True))]
    del looked, run
    for name in ("Liger fused linear JSD", "the seeds' loop"):
        fresh()
        with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
            found[name] = [(0.0, start), *_peer(name, rows, steps, dtype, measured)]
    for name, points in found.items():
        print(f"| {name} | " + ", ".join(f"{t:.2f} s: {kl:.4f}" for t, kl in points), flush=True)
    target = max(points[-1][1] for points in found.values())
    for name, points in found.items():
        reached = next(t for t, kl in points if kl <= target)
        print(f"| {name} | {reached:.2f} s to a validation KL of {target:.4f} (T^2 times nats a label) |", flush=True)
    (out / "distill_curve.json").write_text(json.dumps(found))
    draw(found, out / "distill_curve.png")


def _peer(
    name: str, rows: list[Example], steps: int, dtype: torch.dtype, measured: Callable[[Any], float]
) -> list[tuple[float, float]]:
    """Seconds of training steps, and the validation KL then."""
    student, teacher = model("student", dtype), model("teacher", dtype).eval().requires_grad_(False)
    settings: dict[str, Any] = dict(rate=RATE, clips=True)
    step, clock, points = peer_steps(name, student, teacher, rows, 32, **settings), 0.0, list[tuple[float, float]]()
    if name != "the seeds' loop":  # what is compiled is not counted for anybody
        step(0)
        student.load_state_dict(model("student", dtype).state_dict())
        step = peer_steps(name, student, teacher, rows, 32, **settings)
    for i in range(steps):
        sync()
        begin = time.perf_counter()
        step(i)
        sync()
        clock += time.perf_counter() - begin
        if i % 2:
            points.append((clock, measured(student)))
    return points


def draw(found: dict[str, list[tuple[float, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, points in found.items():
        axes.plot([max(t, 1e-2) for t, _ in points], [kl for _, kl in points], "o-", label=name)
    axes.set(xscale="log", yscale="log", xlabel="seconds of training steps", ylabel="validation KL, T^2 * nats a label",
             title="1B -> 270M shapes, 32 rows a step, one H200: each row once, from the same start")  # fmt: skip
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=110)
