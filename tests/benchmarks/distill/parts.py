"""Our trainer with its parts taken away one by one, and the loss alone."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks.engine.data.chat_template import Example
from tasks.engine.losses.chunked import distillation
from tasks.engine.losses.loss_mix import Head, LossMix
from tests.benchmarks.distill.ours import ours, states_of
from tests.benchmarks.distill.shapes import CE, DEVICE, KD, SHAPES, SIZES, T, fresh, peak_gib, say, sync

VARIANTS: dict[str, dict[str, Any]] = {
    "padded, eager": {"packing": "off", "cuda_graphs": "off"},
    "packed, eager": {"cuda_graphs": "off"},
    "packed, graph": {"layers": "transformers"},
    "packed, compiled, graph": {"compile": "on", "layers": "transformers"},
    "packed, written out, graph": {},
}


def parts(rows: list[Example], directory: Path, batch: int, micros: list[int]) -> None:
    """Our trainer, slowest way first."""
    states, _ = states_of(rows, directory)
    for name, settings in VARIANTS.items():
        for micro in micros if "written" in name else micros[:1]:
            run = ours(states, rows, 24, batch, micro, **{"compile": "off", **settings}, loss_chunk_mib=1024)
            note = f"median {run['median']:.1f}, first steps {run['first']:.0f} s"
            say(f"{name}, {batch // micro} micro-batches", batch, run["ms"], rows, run["peak"], note)
            del run


def timed(call: Callable[[], Any], count: int = 5) -> float:
    """Milliseconds of a call, by events."""
    call()
    if DEVICE == "cpu":
        return 0.0
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(count):
        call()
    end.record()
    sync()
    return float(begin.elapsed_time(end) / count)


def loss_alone(labels: int = 5760) -> None:
    """Milliseconds of forward and backward for 128 short rows' labels, by chunk; errors against float64."""
    g = torch.Generator(DEVICE).manual_seed(0)
    (hidden, _, _), (width, _, _) = SHAPES["student"], SHAPES["teacher"]

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g, device=DEVICE) * scale).bfloat16()

    pieces = SIZES["vocabulary"]
    student, teacher = Head(randn(pieces, hidden, scale=0.06)), Head(randn(pieces, width, scale=0.05))
    x, states = randn(labels, hidden), randn(labels, width)
    y = torch.randint(0, pieces, (labels,), generator=g, device=DEVICE)
    mix, into = LossMix(KD, CE, T), torch.zeros(pieces, hidden, device=DEVICE)
    parts = mix.weights(x.device)
    x.requires_grad_()
    for mib in (256, 512, 1024, 1280, 1792, 4096):
        fresh()
        run = functools.partial(
            distillation, x, student, y, states, teacher, mix, mib << 20, head_grad=into, part_weights=parts
        )
        ms = timed(lambda run=run: run().loss.backward())  # type: ignore[misc]
        print(f"| loss, chunk {mib} MiB | {ms:.2f} ms | peak {peak_gib()[0]:.2f} GiB", flush=True)
    n = 64
    into.zero_()
    x.grad = None
    got = distillation(x[:n], student, y[:n], states[:n], teacher, mix, head_grad=into)
    got.loss.backward()
    exact = x[:n].detach().double().requires_grad_(), student.weight.double().requires_grad_()
    want = distillation(exact[0], Head(exact[1]), y[:n], states[:n].double(), Head(teacher.weight.double()), mix)
    want.loss.backward()
    pairs = {
        "kd": (got.kd_loss, want.kd_loss), "ce": (got.ce_loss, want.ce_loss), "d head": (into, exact[1].grad),
        "d hidden": (x.grad[:n], exact[0].grad), "kd norm": (got.kd_grad_norm, want.kd_grad_norm),
    }  # fmt: skip
    errors = {name: float((a.double() - b).norm() / b.norm()) for name, (a, b) in pairs.items()}
    print(
        "| relative error against float64 | " + ", ".join(f"{name} {e:.1e}" for name, e in errors.items()), flush=True
    )
