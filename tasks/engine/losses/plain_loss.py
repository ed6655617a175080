"""The loss of a chunk's logits and its gradient in plain torch: the reference of the kernels, and what CPUs run.

Suffixes: C positions of the chunk, V student vocabulary, W teacher vocabulary, S = min(V, W) shared columns, K kept
entries of a top k, B = K + 1 buckets (those and the tail).
"""

import math

import torch
from torch import Tensor

from tasks.engine.losses.loss_mix import Head, LossMix, TopK


def chunk_losses(
    products_CV: Tensor,
    head: Head,
    labels_C: Tensor,
    label_weights_C: Tensor,
    teacher: Tensor | TopK | None,
    mix: LossMix,
    part_weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """The loss's gradient (C, V) in products = hidden @ head.weight.T, and kd, ce, kd_norm, ce_norm a position (4, C).

        kd = T^2 D(softmax(teacher / T), softmax(student / T))          ce = -log softmax(student)[label]
        gradient = label_weight * (part_weights[0] * dkd + part_weights[1] * dce)

    `teacher` is its logits (C, W). The weights do not multiply the four returned numbers.
    """
    logits_CV = head.capped(products_CV)
    rows_C = torch.arange(len(labels_C), device=labels_C.device)
    logq_CV = torch.log_softmax(logits_CV, -1)
    ce_C = -logq_CV[rows_C, labels_C]
    kd_C = kd_norm_C = torch.zeros_like(ce_C)
    kd_grad = None
    if teacher is not None:
        tempered_logq_CV = logq_CV if mix.temperature == 1 else torch.log_softmax(logits_CV / mix.temperature, -1)
        kd_C, kd_grad = _divergence_and_gradient(tempered_logq_CV, teacher, mix)
        kd_norm_C = torch.linalg.vector_norm(kd_grad, dim=-1)
    grad_CV = logq_CV.exp_() if teacher is None or mix.temperature != 1 else logq_CV.exp()
    grad_CV[rows_C, labels_C] -= 1
    ce_norm_C = torch.linalg.vector_norm(grad_CV, dim=-1)
    part_weights = part_weights.to(grad_CV.dtype)
    grad_CV *= (label_weights_C * part_weights[1])[:, None]
    if kd_grad is not None:
        grad_CV[:, : kd_grad.shape[1]] += kd_grad.mul_((label_weights_C * part_weights[0])[:, None])
    if head.softcap is not None:
        grad_CV *= 1 - (logits_CV / head.softcap).square_()
    return grad_CV, torch.stack([kd_C, ce_C, kd_norm_C, ce_norm_C])


def _divergence_and_gradient(logq_CV: Tensor, teacher: Tensor | TopK, mix: LossMix) -> tuple[Tensor, Tensor]:
    """T^2 D (C,) and its gradient in the student's logits (C, S), of a top k (C, V); logq is at temperature T.

    With z = logits / T: dD/dz = q dD/dq - q sum(q dD/dq), and d(T^2 D)/dlogits = T dD/dz.
    """
    t = mix.temperature
    if isinstance(teacher, TopK):
        value_C, grad = _top_k_divergence(logq_CV, teacher, mix)
    else:
        shared = min(logq_CV.shape[1], teacher.shape[1])
        logq_CS = logq_CV
        if shared < logq_CV.shape[1]:
            logq_CS = logq_CV[:, :shared] - torch.logsumexp(logq_CV[:, :shared], -1, keepdim=True)
        q_CS = logq_CS.exp()
        value_C, weighted_CS = mix.terms(torch.log_softmax(teacher[:, :shared] / t, -1), logq_CS, q_CS)
        grad = weighted_CS.sub_(q_CS.mul_(weighted_CS.sum(-1, keepdim=True)))
    return value_C * (t * t), grad.mul_(t)


def _top_k_divergence(logq_CV: Tensor, teacher: TopK, mix: LossMix) -> tuple[Tensor, Tensor]:
    """D (C,) over the teacher's k tokens and one bucket for all others, and dD/dz (C, V)."""
    logp_CK = teacher.logits.to(logq_CV.dtype) / mix.temperature - teacher.lse[:, None]
    ids_CK = teacher.ids.long()
    # A padded teacher's further columns belong to the tail: the student has none of them.
    in_student_CK = ids_CK < logq_CV.shape[1]
    logp_CK = logp_CK.masked_fill(~in_student_CK, -math.inf)
    ids_CK = ids_CK.clamp(max=logq_CV.shape[1] - 1)
    logq_CK = logq_CV.gather(1, ids_CK).masked_fill(~in_student_CK, -math.inf)
    tiny = math.log(torch.finfo(logq_CV.dtype).tiny)
    logp_CB = torch.cat([logp_CK, _log_tail(logp_CK)], 1).clamp(min=tiny)
    logq_CB = torch.cat([logq_CK, _log_tail(logq_CK)], 1).clamp(min=tiny)
    q_CB = logq_CB.exp()
    value_C, weighted_CB = mix.terms(logp_CB, logq_CB, q_CB)
    total_C1 = weighted_CB.sum(-1, keepdim=True)
    # A token of the tail takes its share of the bucket's gradient.
    grad_CV = logq_CV.exp() * (weighted_CB[:, -1:] / q_CB[:, -1:] - total_C1)
    grad_CK = (weighted_CB - q_CB * total_C1)[:, :-1]
    correction_CK = torch.where(in_student_CK, grad_CK - grad_CV.gather(1, ids_CK), 0)
    return value_C, grad_CV.scatter_add_(1, ids_CK, correction_CK)


def _log_tail(logs_CK: Tensor) -> Tensor:
    """log(1 - sum exp(logs)) (C, 1), no lower than what float arithmetic can tell from 0."""
    eps = torch.finfo(logs_CK.dtype).eps
    return torch.log1p(-logs_CK.exp().sum(-1, keepdim=True).clamp(max=1 - eps))
