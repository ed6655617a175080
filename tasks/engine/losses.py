"""Losses over a large vocabulary that never hold (tokens x vocabulary): logits live a chunk of rows at a time.

The gradient is made in the forward pass, while a chunk's logits are there; backward only scales it. Shapes:
N labelled positions, H student width, G teacher width, V student vocabulary, W teacher vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]


class Head(NamedTuple):
    """What turns a final hidden state into logits: `softcap * tanh(hidden @ weight.T / softcap)`; weight (V, H)."""

    weight: Tensor
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits (N, V) of hidden states (N, H), multiplied in the hidden states' dtype (float64 stays so)."""
        logits = hidden @ self.weight.to(hidden.dtype).T
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass(frozen=True)
class Mix:
    """kd_weight * T^2 * divergence(teacher, student; T) + ce_weight * cross-entropy.

    T^2 multiplies value and gradient alike (Hinton et al., arXiv 1503.02531), so a change of temperature leaves the
    gradient's size about as it was. `beta` is the teacher's share in the mixture of `jsd`.
    """

    kd_weight: float
    ce_weight: float
    temperature: float = 1.0
    divergence: Divergence = "forward_kl"
    beta: float = 0.5


class Losses(NamedTuple):
    """Sums over the N positions. Only `loss` carries a gradient; loss = kd_weight * kd_loss + ce_weight * ce_loss."""

    loss: Tensor
    kd_loss: Tensor
    ce_loss: Tensor


def cross_entropy(hidden: Tensor, head: Head, labels: Tensor, chunk_bytes: int = 1 << 28) -> Tensor:
    """Summed cross-entropy of hidden states (N, H) with labels (N,)."""
    return _run(hidden, head, labels, Mix(0, 1), None, None, chunk_bytes).loss


def distillation(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Head,
    mix: Mix,
    chunk_bytes: int = 1 << 28,
) -> Losses:
    """Distillation of the teacher's (N, G) states through its frozen head, mixed with cross-entropy.

    Where one vocabulary is padded (262208 rows beside 262144) the divergence compares the shared columns, each side
    normalised over them; cross-entropy sees all of the student's.
    """
    return _run(hidden, head, labels, mix, teacher_hidden, teacher_head, chunk_bytes)


def _run(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    mix: Mix,
    teacher_hidden: Tensor | None,
    teacher_head: Head | None,
    chunk_bytes: int,
) -> Losses:
    if bool(torch.is_autocast_enabled(hidden.device.type)):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    with torch.autocast(hidden.device.type, enabled=False):
        sums = _apply(hidden, head.weight, head.softcap, labels, mix, teacher_hidden, teacher_head, chunk_bytes)
    return Losses(*sums)


class _Chunked(torch.autograd.Function):
    """Loss, and its gradients in hidden states and head weight, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        softcap: float | None,
        labels: Tensor,
        mix: Mix,
        teacher_hidden: Tensor | None,
        teacher_head: Head | None,
        chunk_bytes: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = Head(weight.to(hidden.dtype), softcap)
        grad_hidden = torch.empty_like(hidden)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=exact) if ctx.needs_input_grad[1] else None
        kd, ce = (torch.zeros((), dtype=exact, device=hidden.device) for _ in range(2))
        for rows in _chunks(len(hidden), len(weight), chunk_bytes):
            logits = head.logits(hidden[rows])
            grad, chunk_ce = _cross_entropy(logits, labels[rows], mix.ce_weight)
            ce += chunk_ce
            if teacher_hidden is not None and teacher_head is not None:
                kd += _divergence(logits, teacher_head.logits(teacher_hidden[rows]), mix, grad)
            if softcap is not None:
                grad *= 1 - (logits / softcap).square_()
            grad = grad.to(hidden.dtype)
            grad_hidden[rows] = grad @ head.weight
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(kd, ce)
        return mix.kd_weight * kd + mix.ce_weight * ce, kd, ce

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled = None if grad_weight is None else grads[0].to(grad_weight.dtype) * grad_weight
        return grads[0].to(grad_hidden.dtype) * grad_hidden, scaled, None, None, None, None, None, None


_apply = cast(Any, _Chunked.apply)


def _chunks(rows: int, vocabulary: int, chunk_bytes: int) -> list[slice]:
    """Slices of rows whose float32 logits, their gradient and two temporaries fit into `chunk_bytes`."""
    step = max(1, chunk_bytes // (4 * 4 * vocabulary))
    return [slice(start, start + step) for start in range(0, rows, step)]


def _cross_entropy(logits: Tensor, labels: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """(weight * gradient in the logits (n, V), summed loss)."""
    logp = torch.log_softmax(logits, -1)
    loss = F.nll_loss(logp, labels, reduction="sum")
    grad = logp.exp_()
    grad[torch.arange(len(labels), device=labels.device), labels] -= 1
    return grad.mul_(weight), loss


def _divergence(logits: Tensor, teacher_logits: Tensor, mix: Mix, grad: Tensor) -> Tensor:
    """T^2 * summed divergence; adds kd_weight times its gradient in the student's logits to `grad` (n, V)."""
    shared, t = min(logits.shape[1], teacher_logits.shape[1]), mix.temperature
    logq = torch.log_softmax(logits[:, :shared] / t, -1)
    logp = torch.log_softmax(teacher_logits[:, :shared] / t, -1)
    if mix.divergence == "forward_kl":  # sum p (log p - log q); d/dlogits = (q - p) / T
        p = logp.exp()
        value = (p * (logp - logq)).sum()
        slope = logq.exp_().sub_(p)
    else:
        q = logq.exp()
        if mix.divergence == "reverse_kl":  # sum q (log q - log p); d/dq = log q - log p (+ a constant)
            ratio = logq - logp
            value = (q * ratio).sum()
        else:  # beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; d/dq = (1 - beta) (log q - log m)
            logm = torch.logaddexp(logp + math.log(mix.beta), logq + math.log1p(-mix.beta))
            value = mix.beta * (logp.exp() * (logp - logm)).sum() + (1 - mix.beta) * (q * (logq - logm)).sum()
            ratio = (1 - mix.beta) * (logq - logm)
        slope = q * (ratio - (q * ratio).sum(-1, keepdim=True))  # through the softmax
    grad[:, :shared] += slope.mul_(mix.kd_weight * t)  # T^2 / T
    return value * t * t
