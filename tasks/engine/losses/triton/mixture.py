# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""Second kernel, for divergences from a mixture (jsd, skew): their value needs both softmax sums first.

KIND is `Divergence.kernel`; the formulas are those of `tasks.engine.losses.divergences`.
"""

import triton
import triton.language as tl

from tasks.engine.losses.triton.tile import LOG2E, WIDE, log2_sum_exp, read_logits


@triton.jit
def _log_mixture(a, b, share):
    """log(share exp(a) + (1 - share) exp(b)), -inf where both are."""
    top = tl.maximum(a, b)
    safe = tl.where(top == float("-inf"), 0.0, top)
    return safe + tl.log(share * tl.exp(a - safe) + (1 - share) * tl.exp(b - safe))


@triton.jit
def mixture_terms(logp, logq, inside, share, KIND: tl.constexpr):
    """Terms of D and of q dD/dq, 0 where `inside` is false, and q; `share` is the divergence's beta or alpha."""
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
def mixture_values(
    student, teacher, sums, mixed, n, student_stride, teacher_stride, columns, shared, temperature, share, cap,
    teacher_cap, KIND: tl.constexpr, CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, EVEN: tl.constexpr,
    PART: tl.constexpr, BLOCK: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Writes `mixed` (2, n, parts): a part's sums of the terms of D and of q dD/dq."""
    row, slices = tl.program_id(1), tl.num_programs(0)
    srow, trow = student + row.to(tl.int64) * student_stride, teacher + row.to(tl.int64) * teacher_stride
    LINES: tl.constexpr = BLOCK // WIDE
    offsets = tl.arange(0, LINES)[:, None] * WIDE + tl.arange(0, WIDE)[None, :] + tl.program_id(0) * PART
    log2_scale = LOG2E / temperature
    lse_q, share_q = log2_sum_exp(sums + row * slices, n * slices, 2, log2_scale, slices, SLICES)
    lse_t, share_t = log2_sum_exp(sums + row * slices, n * slices, 4, log2_scale, slices, SLICES)
    values, weighted_sums = tl.zeros((LINES,), tl.float32), tl.zeros((LINES,), tl.float32)
    for start in range(0, PART, BLOCK):
        cols = start + offsets
        logq = (read_logits(srow, cols, shared, cap, CAPPED, EVEN) * log2_scale - lse_q) / LOG2E
        logp = (read_logits(trow, cols, shared, teacher_cap, TEACHER_CAPPED, EVEN) * log2_scale - lse_t) / LOG2E
        value_terms, weighted, q = mixture_terms(logp, logq, cols < shared, share, KIND)
        values, weighted_sums = values + tl.sum(value_terms, 1), weighted_sums + tl.sum(weighted, 1)
    out = mixed + row * slices + tl.program_id(0)
    tl.store(out, tl.sum(values))
    tl.store(out + n * slices, tl.sum(weighted_sums))
