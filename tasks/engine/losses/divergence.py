"""The formulas, in plain torch, on a chunk of logits: the reference for the kernel, and the CPU's path.

Shapes: n positions of the chunk, V student vocabulary, W teacher vocabulary, S = min(V, W) shared columns.
"""

import math

import torch
from torch import Tensor

from tasks.engine.losses.loss_mix import Head, Mix, TopK


def chunk_losses(
    products: Tensor,
    head: Head,
    labels: Tensor,
    weights: Tensor,
    teacher: Tensor | TopK | None,
    mix: Mix,
    parts: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradient (n, V) in `products` = hidden @ head.weight.T, and (kd, ce, kd_norm, ce_norm) a position: (4, n).

    `teacher` is its logits (n, W). `weights` (n,) multiply a position's gradient, `parts` (2,) those of the divergence
    and of cross-entropy; neither multiplies the returned numbers.
    """
    logits = head.capped(products)
    lines = torch.arange(len(labels), device=labels.device)
    logq = torch.log_softmax(logits, -1)
    ce = -logq[lines, labels]
    kd = kd_norm = torch.zeros_like(ce)
    slope = None
    if teacher is not None:
        shared = mix.temperature == 1  # one softmax serves both
        tempered = logq if shared else torch.log_softmax(logits / mix.temperature, -1)
        kd, slope = _kd(tempered, teacher, mix)
        kd_norm = torch.linalg.vector_norm(slope, dim=-1)
    grad = logq.exp_() if teacher is None or mix.temperature != 1 else logq.exp()
    grad[lines, labels] -= 1
    ce_norm = torch.linalg.vector_norm(grad, dim=-1)
    parts = parts.to(grad.dtype)
    grad *= (weights * parts[1])[:, None]
    if slope is not None:
        grad[:, : slope.shape[1]] += slope.mul_((weights * parts[0])[:, None])
    if head.softcap is not None:
        grad *= 1 - (logits / head.softcap).square_()
    return grad, torch.stack([kd, ce, kd_norm, ce_norm])


def _kd(logq: Tensor, teacher: Tensor | TopK, mix: Mix) -> tuple[Tensor, Tensor]:
    """T^2 * divergence (n,) and its gradient in the student's logits (n, S or V); logq is tempered, (n, V)."""
    t = mix.temperature
    if isinstance(teacher, TopK):
        value, slope = _topk(logq, teacher, mix)
    else:
        shared = min(logq.shape[1], teacher.shape[1])
        if shared < logq.shape[1]:
            logq = logq[:, :shared] - torch.logsumexp(logq[:, :shared], -1, keepdim=True)
        value, weighted, q = divergence(torch.log_softmax(teacher[:, :shared] / t, -1), logq, mix)
        slope = weighted.sub_(q.mul_(weighted.sum(-1, keepdim=True)))
    return value * (t * t), slope.mul_(t)  # T^2 times the 1/T of the softmax


def divergence(logp: Tensor, logq: Tensor, mix: Mix) -> tuple[Tensor, Tensor, Tensor]:
    """D(p, q) a row, q * dD/dq, and q, from log-probabilities (n, S).

    The gradient in the logits of q is then q dD/dq - q sum(q dD/dq). Terms of q dD/dq that are a multiple of q vanish
    there and are left out.
    """
    q = logq.exp()
    if mix.divergence == "forward_kl":
        p = logp.exp()
        return (p * (logp - logq)).sum(-1), p.neg_(), q
    if mix.divergence == "reverse_kl":
        weighted = q * (logq - logp)
        return weighted.sum(-1), weighted, q
    p = logp.exp()
    if mix.divergence == "jsd":
        logm = torch.logaddexp(logp + math.log(mix.beta), logq + math.log1p(-mix.beta))
        weighted = q * (logq - logm) * (1 - mix.beta)
        return mix.beta * (p * (logp - logm)).sum(-1) + weighted.sum(-1), weighted, q
    alpha = mix.skew
    skewed, other = (logp, logq) if mix.divergence == "skew_kl" else (logq, logp)
    logm = torch.logaddexp(skewed + math.log(alpha), other + math.log1p(-alpha)) if alpha else other
    if mix.divergence == "skew_kl":  # d/dq = -(1 - alpha) p / m
        return (p * (logp - logm)).sum(-1), p * (logq - logm).exp_().mul_(alpha - 1), q
    ratio = logq - logm  # d/dq = log q - log m - alpha q / m (+ a constant)
    return (q * ratio).sum(-1), q * (ratio - alpha * ratio.exp()), q


def _topk(logq: Tensor, teacher: TopK, mix: Mix) -> tuple[Tensor, Tensor]:
    """The divergence over k tokens and one bucket for all others; its gradient in all of the student's logits."""
    logp = teacher.logits.to(logq.dtype) / mix.temperature - teacher.lse[:, None]
    ids = teacher.ids.long()
    known = ids < logq.shape[1]  # a padded teacher's extra columns belong to the tail, where the student has nothing
    logp = logp.masked_fill(~known, -math.inf)
    ids = ids.clamp(max=logq.shape[1] - 1)
    top = logq.gather(1, ids).masked_fill(~known, -math.inf)
    tail_p, tail_q = _rest(logp), _rest(top)
    tiny = math.log(torch.finfo(logq.dtype).tiny)
    buckets_p = torch.cat([logp, tail_p], 1).clamp(min=tiny)
    buckets_q = torch.cat([top, tail_q], 1).clamp(min=tiny)
    value, weighted, bucket = divergence(buckets_p, buckets_q, mix)
    mean = weighted.sum(-1, keepdim=True)
    slope = logq.exp() * (weighted[:, -1:] / bucket[:, -1:] - mean)  # a tail token has its share of the bucket
    inside = (weighted - bucket * mean)[:, :-1]
    return value, slope.scatter_add_(1, ids, torch.where(known, inside - slope.gather(1, ids), 0))


def _rest(logs: Tensor) -> Tensor:
    """log(1 - sum exp(logs)) (n, 1), no lower than what float arithmetic can tell from 0."""
    eps = torch.finfo(logs.dtype).eps
    return torch.log1p(-logs.exp().sum(-1, keepdim=True).clamp(max=1 - eps))
