# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""The formulas as one Triton kernel for CUDA: a chunk's logits of student and teacher in, the gradient in their place.

One program a position. A first pass over its logits takes the maxima, the softmax sums at temperatures 1 and T and the
divergence's value online; a second one, from the end so that what the first read last is still in the L2 cache, writes
the gradient over the student's logits. The mixtures (jsd, skew) need the sums before their value: three passes.

A block is a tile of LINES x 8 logits, and each line keeps a maximum and sums of its own until the pass is over: threads
do not wait for each other, and the sums take an eighth of the registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tasks.engine.losses.mix import Head, Mix

CODES = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2, "skew_kl": 3, "skew_reverse_kl": 4}
BLOCK, WARPS = 4096, 8
WIDE = tl.constexpr(8)  # logits of a line: 16 bytes, what a thread loads at once


def chunk_losses(
    products: Tensor,
    head: Head,
    labels: Tensor,
    weights: Tensor,
    teacher: Tensor | None,
    teacher_softcap: float | None,
    mix: Mix,
    parts: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `tasks.engine.losses.divergence.chunk_losses`, but `products` (n, V) turns into the gradient.

    `teacher` (n, W) are products too: its softcap is applied here.
    """
    n, columns = products.shape
    numbers = torch.empty((4, n), dtype=torch.float32, device=products.device)
    known = products if teacher is None else teacher
    shared = min(columns, known.shape[1])
    _losses[(n,)](
        products, known, labels, weights, parts, numbers, n, products.stride(0), known.stride(0), columns, shared,
        mix.temperature, mix.beta if mix.divergence == "jsd" else mix.skew, head.softcap or 1.0, teacher_softcap or 1.0,
        KIND=-1 if teacher is None else CODES[mix.divergence], T_IS_2=mix.temperature == 2, T_IS_1=mix.temperature == 1,
        CAPPED=head.softcap is not None, TEACHER_CAPPED=teacher_softcap is not None,
        EVEN=columns % BLOCK == 0 and shared == columns, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return products, numbers


@triton.jit
def _read(row, cols, columns, cap, CAPPED: tl.constexpr, EVEN: tl.constexpr):
    """Logits in float32; -inf behind the last column."""
    if EVEN:
        x = tl.load(row + cols).to(tl.float32)
    else:
        x = tl.load(row + cols, mask=cols < columns, other=0.0).to(tl.float32)
    if CAPPED:
        x = cap * (2 * tl.sigmoid(2 * x / cap) - 1)
    if not EVEN:
        x = tl.where(cols < columns, x, float("-inf"))
    return x


@triton.jit
def _finite(high):
    """What to subtract from a line's logits: its maximum, or 0 while it has none."""
    return tl.where(high == float("-inf"), 0.0, high)


@triton.jit
def _log_mixture(a, b, share):
    """log(share exp(a) + (1 - share) exp(b)), -inf where both are."""
    top = tl.maximum(a, b)
    safe = tl.where(top == float("-inf"), 0.0, top)
    return safe + tl.log(share * tl.exp(a - safe) + (1 - share) * tl.exp(b - safe))


@triton.jit
def _mixed(logp, logq, inside, share, KIND: tl.constexpr):
    """Terms of the divergence and of q dD/dq, 0 where `inside` is false; see divergence.divergence."""
    p, q = tl.exp(logp), tl.exp(logq)
    if KIND == 2:
        logm = _log_mixture(logp, logq, share)
        weighted = q * (logq - logm) * (1 - share)
        value = share * p * (logp - logm) + weighted
    elif KIND == 3:
        logm = _log_mixture(logp, logq, share)
        value = p * (logp - logm)
        weighted = p * tl.exp(logq - logm) * (share - 1)
    else:
        logm = _log_mixture(logq, logp, share)
        value = q * (logq - logm)
        weighted = value - share * q * tl.exp(logq - logm)
    return tl.where(inside, value, 0.0), tl.where(inside, weighted, 0.0), q


@triton.jit
def _losses(
    student, teacher, labels, weights, parts, numbers, n, student_stride, teacher_stride, columns, shared,
    temperature, share, cap, teacher_cap,
    KIND: tl.constexpr, T_IS_2: tl.constexpr, T_IS_1: tl.constexpr, CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    srow, trow = student + row.to(tl.int64) * student_stride, teacher + row.to(tl.int64) * teacher_stride
    label, weight = tl.load(labels + row), tl.load(weights + row)
    LINES: tl.constexpr = BLOCK // WIDE
    lanes = tl.arange(0, LINES)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
    cold = 1.0 / temperature
    none = tl.full((LINES,), float("-inf"), tl.float32)
    m, m_q, m_t = none, none, none
    z, z_q = tl.zeros((LINES,), tl.float32), tl.zeros((LINES,), tl.float32)
    z_t, acc = tl.zeros((LINES,), tl.float32), tl.zeros((LINES,), tl.float32)
    for start in range(0, columns, BLOCK):
        cols = start + lanes
        s = _read(srow, cols, columns, cap, CAPPED, EVEN)
        high = tl.maximum(m, tl.max(s, 1))
        base = high if EVEN else _finite(high)
        if KIND >= 0:
            s_q = s
            if EVEN:
                high_q = high
            else:
                s_q = tl.where(cols < shared, s, float("-inf"))
                high_q = tl.maximum(m_q, tl.max(s_q, 1))
            t = _read(trow, cols, shared, teacher_cap, TEACHER_CAPPED, EVEN)
            high_t = tl.maximum(m_t, tl.max(t, 1))
            base_q, base_t = high_q, high_t
            if not EVEN:
                base_q, base_t = _finite(high_q), _finite(high_t)
            e_q, e_t = tl.exp((s_q - base_q[:, None]) * cold), tl.exp((t - base_t[:, None]) * cold)
            fade_q, fade_t = tl.exp((m_q - base_q) * cold), tl.exp((m_t - base_t) * cold)
            z_q, z_t = z_q * fade_q + tl.sum(e_q, 1), z_t * fade_t + tl.sum(e_t, 1)
            if KIND == 0:
                term = e_t * (t - s_q)
                acc = acc * fade_t + tl.sum(term if EVEN else tl.where(cols < shared, term, 0.0), 1)
            elif KIND == 1:
                term = e_q * (s_q - t)
                acc = acc * fade_q + tl.sum(term if EVEN else tl.where(cols < shared, term, 0.0), 1)
            m_q, m_t = high_q, high_t
        if KIND >= 0 and EVEN and T_IS_2:
            e = e_q * e_q
        elif KIND >= 0 and EVEN and T_IS_1:
            e = e_q
        else:
            e = tl.exp(s - base[:, None])
        z = z * tl.exp(m - base) + tl.sum(e, 1)
        m = high
    top = tl.max(m)
    lse = top + tl.log(tl.sum(z * tl.exp(m - top)))
    picked = tl.load(srow + tl.maximum(label, 0)).to(tl.float32)
    if CAPPED:
        picked = cap * (2 * tl.sigmoid(2 * picked / cap) - 1)
    lse_q, lse_t, value, mean = 0.0, 0.0, 0.0, 0.0
    if KIND >= 0:
        top_q, top_t = tl.max(m_q), tl.max(m_t)
        share_q, share_t = tl.exp((m_q - top_q) * cold), tl.exp((m_t - top_t) * cold)
        sum_q, sum_t = tl.sum(z_q * share_q), tl.sum(z_t * share_t)
        lse_q, lse_t = top_q * cold + tl.log(sum_q), top_t * cold + tl.log(sum_t)
        if KIND == 0:
            value = tl.sum(acc * share_t) * cold / sum_t - lse_t + lse_q
        elif KIND == 1:
            value = tl.sum(acc * share_q) * cold / sum_q - lse_q + lse_t
            mean = value
        else:
            values, weighteds = tl.zeros((LINES,), tl.float32), tl.zeros((LINES,), tl.float32)
            for start in range(0, shared, BLOCK):
                cols = start + lanes
                logq = _read(srow, cols, shared, cap, CAPPED, EVEN) * cold - lse_q
                logp = _read(trow, cols, shared, teacher_cap, TEACHER_CAPPED, EVEN) * cold - lse_t
                one, weighted, _ = _mixed(logp, logq, cols < shared, share, KIND)
                values, weighteds = values + tl.sum(one, 1), weighteds + tl.sum(weighted, 1)
            value, mean = tl.sum(values), tl.sum(weighteds)
    kd_part, ce_part = tl.load(parts).to(tl.float32), tl.load(parts + 1).to(tl.float32)
    kd_scale, ce_scale = weight * kd_part * temperature, weight * ce_part
    kd_square, ce_square = tl.zeros((LINES,), tl.float32), tl.zeros((LINES,), tl.float32)
    blocks = tl.cdiv(columns, BLOCK)
    for i in range(blocks):
        cols = (blocks - 1 - i) * BLOCK + lanes
        s = _read(srow, cols, columns, cap, CAPPED, EVEN)
        if KIND >= 0:
            s_q = s if EVEN else tl.where(cols < shared, s, float("-inf"))
            t = _read(trow, cols, shared, teacher_cap, TEACHER_CAPPED, EVEN)
            logq, logp = s_q * cold - lse_q, t * cold - lse_t
            if KIND == 0:
                q = tl.exp(logq)
                slope = q - tl.exp(logp)
            elif KIND == 1:
                q = tl.exp(logq)
                slope = q * (logq - logp - mean)
                slope = slope if EVEN else tl.where(cols < shared, slope, 0.0)
            else:
                _, weighted, q = _mixed(logp, logq, cols < shared, share, KIND)
                slope = weighted - q * mean
            kd_square += tl.sum(slope * slope, 1)
        if KIND >= 0 and EVEN and T_IS_2:
            q = q * tl.exp(lse_q - 0.5 * lse)
            hard = q * q
        elif KIND >= 0 and EVEN and T_IS_1:
            hard = q
        else:
            hard = tl.exp(s - lse)
        hard = tl.where(cols == label, hard - 1, hard)
        ce_square += tl.sum(hard * hard, 1)
        grad = ce_scale * hard
        if KIND >= 0:
            grad += kd_scale * slope
        if CAPPED:
            grad *= 1 - (s / cap) * (s / cap)
        grad = tl.where(weight == 0, 0.0, grad)  # a masked position may hold anything, NaN as well
        if EVEN:
            tl.store(srow + cols, grad.to(student.dtype.element_ty))
        else:
            tl.store(srow + cols, grad.to(student.dtype.element_ty), mask=cols < columns)
    tl.store(numbers + row, value * temperature * temperature)
    tl.store(numbers + n + row, lse - picked)
    tl.store(numbers + 2 * n + row, tl.sqrt(tl.sum(kd_square)) * temperature)
    tl.store(numbers + 3 * n + row, tl.sqrt(tl.sum(ce_square)))
