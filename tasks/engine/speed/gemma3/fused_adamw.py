# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""AdamW in one pass over weights, gradients and moments: it also clips, and leaves the weights' bfloat16 copies behind.

torch's own reads and writes all of that three times more: for the clipped gradients, and for the copies.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 2048, 8
COLUMNS = tl.constexpr(6)  # of the table: addresses of weights, gradients, moments and copies, and their number


class AdamW(torch.optim.AdamW):
    """torch's AdamW with its state and its numbers. `copies` are by a parameter's id, gradients are multiplied by
    `factor` first; where `found_inf` is not 0 nothing moves. `after` is called with each step."""

    def __init__(
        self, params: Any, lr: float, copies: dict[int, Tensor], factor: Tensor, after: Callable[[], None]
    ) -> None:
        super().__init__(params, lr=lr, weight_decay=0.0, fused=True)
        self.copies, self.factor, self.after = copies, factor, after
        self.found_inf: Tensor | None = None
        self._tables: list[tuple[list[int], Tensor]] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; a closure is not taken."""
        found = self.found_inf if self.found_inf is not None else torch.zeros_like(self.factor)
        tables = [self._table(number, group["params"]) for number, group in enumerate(self.param_groups)]
        for group, table in zip(self.param_groups, tables, strict=True):
            if not len(table):
                continue
            steps = [self.state[p]["step"] for p in group["params"]]
            # A tensor by itself would be taken for a number: the host would wait for the device to have it.
            torch._foreach_add_(steps, [1 - found] * len(steps))
            beta1, beta2 = group["betas"]
            _adamw[(len(table),)](
                table, self.factor, found, steps[0], float(group["lr"]), 1 - beta1, 1 - beta2, math.log(beta1),
                math.log(beta2), group["eps"], group["lr"] * group["weight_decay"], BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
        self.after()

    def _table(self, number: int, params: list[Tensor]) -> Tensor:
        """The group's addresses, anew where a tensor has moved (a checkpoint was read)."""
        parts = []
        for p in params:
            state = self.state[p]
            if "exp_avg" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            assert p.grad is not None
            parts.append((p, p.grad, state["exp_avg"], state["exp_avg_sq"], self.copies[id(p)]))
        at = [part.data_ptr() for five in parts for part in five]
        if number < len(self._tables) and self._tables[number][0] == at:
            return self._tables[number][1]
        lines = [
            [*(part.data_ptr() + start * part.element_size() for part in five), min(BLOCK, five[0].numel() - start)]
            for five in parts
            for start in range(0, five[0].numel(), BLOCK)
        ]
        table = torch.tensor(lines, dtype=torch.int64).to(self.factor.device)
        self._tables[number : number + 1] = [(at, table)]
        return table


@triton.jit
def _corrected(count, log_beta):
    """1 - beta^count, by a series where it is small."""
    x = count * log_beta
    return tl.where(x > -0.1, -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5)))), 1 - tl.exp(x))


@triton.jit
def _adamw(
    table, factor, found_inf, step, lr, rest1, rest2, log_beta1, log_beta2, eps, decay, BLOCK: tl.constexpr
):  # fmt: skip
    if tl.load(found_inf) != 0:
        return
    row = table + tl.program_id(0) * COLUMNS
    weights = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.float32)), 16)
    grads = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.float32)), 16)
    firsts = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.float32)), 16)
    seconds = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(tl.float32)), 16)
    copies = tl.multiple_of(tl.load(row + 4).to(tl.pointer_type(tl.bfloat16)), 16)
    number, scale, count = tl.load(row + 5), tl.load(factor), tl.load(step)
    by_first, by_second = lr / _corrected(count, log_beta1), tl.rsqrt(_corrected(count, log_beta2))
    at = tl.arange(0, BLOCK)
    if number == BLOCK:
        _move(weights, grads, firsts, seconds, copies, at, None, scale, by_first, by_second, rest1, rest2, eps, decay)
    else:
        there = at < number
        _move(weights, grads, firsts, seconds, copies, at, there, scale, by_first, by_second, rest1, rest2, eps, decay)


@triton.jit
def _move(
    weights, grads, firsts, seconds, copies, at, there, scale, by_first, by_second, rest1, rest2, eps, decay
):  # fmt: skip
    w, g = tl.load(weights + at, mask=there), tl.load(grads + at, mask=there) * scale
    m, v = tl.load(firsts + at, mask=there), tl.load(seconds + at, mask=there)
    m += rest1 * (g - m)
    v += rest2 * (g * g - v)
    w = w - decay * w - by_first * m / (tl.sqrt(v) * by_second + eps)
    tl.store(firsts + at, m, mask=there)
    tl.store(seconds + at, v, mask=there)
    tl.store(weights + at, w, mask=there)
    tl.store(copies + at, w.to(tl.bfloat16), mask=there)
