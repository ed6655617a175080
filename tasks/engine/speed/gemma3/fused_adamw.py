# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""AdamW as one Triton kernel that also scales gradients (clipping) and writes the weights' bfloat16 copies.

    g = factor * grad                       m += (1 - beta1) (g - m)              v += (1 - beta2) (g^2 - v)
    w -= lr * weight_decay * w + lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

torch's own, with clipping and copies apart, reads and writes weights and gradients three times more.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 2048, 8
COLUMNS = tl.constexpr(6)  # of the table: addresses of weights, gradients, two moments and copies; number of values


class AdamW(torch.optim.AdamW):
    """torch's AdamW, state and results alike, that multiplies gradients by `factor` () and updates `copies`.

    `copies` are bfloat16 tensors by `id` of a parameter. Nothing changes where `found_inf` is not 0. `after_step` is
    called after each step.
    """

    def __init__(
        self, params: Any, lr: float, copies: dict[int, Tensor], factor: Tensor, after_step: Callable[[], None]
    ) -> None:
        super().__init__(params, lr=lr, weight_decay=0.0, fused=True)
        self.copies, self.factor, self.after_step = copies, factor, after_step
        self.found_inf: Tensor | None = None
        self._tables: list[tuple[list[int], Tensor]] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of all groups; `closure` is not called."""
        found_inf = self.found_inf if self.found_inf is not None else torch.zeros_like(self.factor)
        tables = [self._table(index, group["params"]) for index, group in enumerate(self.param_groups)]
        for group, table in zip(self.param_groups, tables, strict=True):
            if not len(table):
                continue
            steps = [self.state[p]["step"] for p in group["params"]]
            # A list of tensors: a single tensor would be taken for a scalar, read on the host with a synchronization.
            torch._foreach_add_(steps, [1 - found_inf] * len(steps))
            beta1, beta2 = group["betas"]
            _adamw_kernel[(len(table),)](
                table, self.factor, found_inf, steps[0], float(group["lr"]), 1 - beta1, 1 - beta2, math.log(beta1),
                math.log(beta2), group["eps"], group["lr"] * group["weight_decay"], BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
        self.after_step()

    def _table(self, index: int, params: list[Tensor]) -> Tensor:
        """Addresses of a group's blocks (blocks, COLUMNS), rebuilt where a tensor has moved (a loaded checkpoint)."""
        tensors = []
        for p in params:
            state = self.state[p]
            if "exp_avg" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            assert p.grad is not None
            tensors.append((p, p.grad, state["exp_avg"], state["exp_avg_sq"], self.copies[id(p)]))
        addresses = [tensor.data_ptr() for five in tensors for tensor in five]
        if index < len(self._tables) and self._tables[index][0] == addresses:
            return self._tables[index][1]
        blocks = [
            [
                *(tensor.data_ptr() + start * tensor.element_size() for tensor in five),
                min(BLOCK, five[0].numel() - start),
            ]
            for five in tensors
            for start in range(0, five[0].numel(), BLOCK)
        ]
        table = torch.tensor(blocks, dtype=torch.int64).to(self.factor.device)
        self._tables[index : index + 1] = [(addresses, table)]
        return table


@triton.jit
def _bias_correction(steps, log_beta):
    """1 - beta^steps, by a series where it is small."""
    x = steps * log_beta
    return tl.where(x > -0.1, -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5)))), 1 - tl.exp(x))


@triton.jit
def _adamw_kernel(
    table, factor, found_inf, step, lr, decay1, decay2, log_beta1, log_beta2, eps, decay, BLOCK: tl.constexpr
):  # fmt: skip
    if tl.load(found_inf) != 0:
        return
    row = table + tl.program_id(0) * COLUMNS
    weights = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.float32)), 16)
    grads = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.float32)), 16)
    moments = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.float32)), 16)
    squares = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(tl.float32)), 16)
    copies = tl.multiple_of(tl.load(row + 4).to(tl.pointer_type(tl.bfloat16)), 16)
    size, scale, steps = tl.load(row + 5), tl.load(factor), tl.load(step)
    rate, inverse = lr / _bias_correction(steps, log_beta1), tl.rsqrt(_bias_correction(steps, log_beta2))
    offset = tl.arange(0, BLOCK)
    if size == BLOCK:
        _update(
            weights, grads, moments, squares, copies, offset, None, scale, rate, inverse, decay1, decay2, eps, decay
        )
    else:
        mask = offset < size
        _update(
            weights, grads, moments, squares, copies, offset, mask, scale, rate, inverse, decay1, decay2, eps, decay
        )


@triton.jit
def _update(
    weights, grads, moments, squares, copies, offset, mask, scale, rate, inverse, decay1, decay2, eps, decay
):  # fmt: skip
    w, g = tl.load(weights + offset, mask=mask), tl.load(grads + offset, mask=mask) * scale
    m, v = tl.load(moments + offset, mask=mask), tl.load(squares + offset, mask=mask)
    m += decay1 * (g - m)
    v += decay2 * (g * g - v)
    w = w - decay * w - rate * m / (tl.sqrt(v) * inverse + eps)
    tl.store(moments + offset, m, mask=mask)
    tl.store(squares + offset, v, mask=mask)
    tl.store(weights + offset, w, mask=mask)
    tl.store(copies + offset, w.to(tl.bfloat16), mask=mask)
