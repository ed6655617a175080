"""The peers' loops, and the table of them beside ours."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.engine.data.chat_template import Example
from tests.benchmarks.distill.ours import ours, states_of
from tests.benchmarks.distill.shapes import CE, DEVICE, KD, T, examples, fresh, model, peak_gib, say, sync


def padded(rows: list[Example], longest: int) -> tuple[Tensor, Tensor, Tensor]:
    ids, labels = torch.zeros(len(rows), longest, dtype=torch.long), torch.full((len(rows), longest), -100)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        n = len(row.input_ids)
        ids[i, :n], labels[i, :n], mask[i, :n] = torch.tensor(row.input_ids), torch.tensor(row.labels), 1
    return ids.to(DEVICE), mask.to(DEVICE), labels.to(DEVICE)


def full_logits(student: Any, teacher: Any) -> Callable[..., Tensor]:
    """KL + CE on whole float32 logits at every position: the seeds' loop, and most trainers'."""

    def loss(ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            t = teacher(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        s = student(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        y = labels[:, 1:]
        keep = y != -100
        kl = F.kl_div(F.log_softmax(s / T, -1), F.softmax(t / T, -1), reduction="none").sum(-1)
        kl = (kl * keep).sum() / keep.sum() * T * T
        return KD * kl + CE * F.cross_entropy(s.flatten(0, 1), y.reshape(-1), ignore_index=-100)

    return loss


def liger(student: Any, teacher: Any) -> Callable[..., Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # Its divergence has no T^2: the weight makes up for it.
    fused = LigerFusedLinearJSDLoss(weight_hard_loss=CE, weight_soft_loss=KD * T * T, beta=0.0, temperature=T)

    def loss(ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        s = student.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1].flatten(0, 1)
        with torch.no_grad():
            t = teacher.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1].flatten(0, 1)
        out = fused(s, student.lm_head.weight, t, teacher.lm_head.weight, labels[:, 1:].flatten())
        return out[0] if isinstance(out, tuple) else out

    return loss


PEERS: dict[str, tuple[Callable[..., Any], int]] = {  # and how many rows are padded together
    "the seeds' loop": (full_logits, 1),
    "full logits, batched": (full_logits, 1000),
    "Liger fused linear JSD": (liger, 1000),
}


def peer_steps(
    name: str, student: Any, teacher: Any, rows: list[Example], batch: int, rate: float = 1e-4, clips: bool = False
) -> Callable[[int], None]:
    """`step(i)` of a peer's loop. Only ours clips gradients; `clips` has a peer do it as well."""
    make, together = PEERS[name]
    loss, together = make(student, teacher), min(together, batch)
    longest = max(len(row.input_ids) for row in rows)  # one shape: what is compiled is compiled once
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, fused=DEVICE == "cuda", weight_decay=0)

    def step(i: int) -> None:
        some = [rows[(i * batch + j) % len(rows)] for j in range(batch)]
        for start in range(0, batch, together):
            (loss(*padded(some[start : start + together], longest)) / (batch // together)).backward()
        if clips:
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peer(name: str, rows: list[Example], batch: int, steps: int) -> float:
    """A peer's line of the table; its rows a second."""
    fresh()
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    # With dynamic shapes torch 2.11 does not compile Liger's last chunk, which is a row shorter than the others.
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        try:
            teacher, student = model("teacher", dtype).eval().requires_grad_(False), model("student", dtype)
            step = peer_steps(name, student, teacher, rows, batch)
            for i in range(2):
                step(i)
            sync()
            start = time.perf_counter()
            for i in range(steps):
                step(i)
            sync()
            ms = (time.perf_counter() - start) / steps * 1e3
        except (torch.OutOfMemoryError, ImportError) as error:
            print(f"| {name} | {batch} | {type(error).__name__}", flush=True)
            return 0.0
    say(name, batch, ms, rows, peak_gib())
    return batch / ms * 1e3


def peers(kind: str, directory: Path, sizes: list[str]) -> None:
    """Everybody's rows a second at several sizes of a step; `sizes` are ours: rows, rows at once, MiB of logits."""
    long = kind == "long"
    rows = examples(512 if not long else 32, long)
    liger, seeds = "Liger fused linear JSD", "the seeds' loop"
    theirs = [(liger, 8, 5), (liger, 32, 5), (liger, 128, 3), (seeds, 32, 1), ("full logits, batched", 32, 3)]
    if long:
        theirs = [(liger, 2, 3), (liger, 8, 3), (seeds, 4, 1)]
    found = {(name, batch): peer(name, rows, batch, steps) for name, batch, steps in theirs}
    states, _ = states_of(rows, directory)
    for batch, micro, mib in (map(int, size.split("/")) for size in sizes):
        run = ours(states, rows, 40 if not long else 16, batch, micro, loss_chunk_mib=mib)
        speed = batch / run["ms"] * 1e3
        ratios = [
            f"{speed / other:.1f} x {name} at {size}"
            for (name, size), other in found.items()
            if other and (name != liger or size == batch or size == 32)
        ]
        note = f"median {run['median']:.1f} ms, first steps {run['first']:.1f} s; {', '.join(ratios)}"
        say(f"ours, {batch // micro} micro-batches, logits in {mib} MiB", batch, run["ms"], rows, run["peak"], note)
        del run
