# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""Last kernel: writes the loss's gradient over the student's logits, and the squared norms of its two parts."""

import triton
import triton.language as tl

from tasks.engine.losses.triton.mixture import mixture_terms
from tasks.engine.losses.triton.tile import LOG2E, WIDE, log2_sum_exp, read_logits


@triton.jit
def logits_gradient(
    student, teacher, labels, weights, part_weights, sums, mixed, teacher_lse, squares, losses, n, student_stride,
    teacher_stride, columns, shared, temperature, share, cap, teacher_cap, KIND: tl.constexpr, CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr, EVEN: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, SLICES: tl.constexpr,
    T_IS_2: tl.constexpr, T_IS_1: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Writes `student` (n, V), `squares` (3, n, parts) and the first two of `losses` (4, n): kd and ce a position.

    With HAS_LSE `teacher_lse` replaces the teacher's sums, and the divergence's value goes into the third of `squares`.
    """
    row, slices = tl.program_id(1), tl.num_programs(0)
    srow, trow = student + row.to(tl.int64) * student_stride, teacher + row.to(tl.int64) * teacher_stride
    label, weight = tl.load(labels + row), tl.load(weights + row)
    LINES: tl.constexpr = BLOCK // WIDE
    offsets = tl.arange(0, LINES)[:, None] * WIDE + tl.arange(0, WIDE)[None, :] + tl.program_id(0) * PART
    log2_scale = LOG2E / temperature
    part_index, row_sums, plane = tl.arange(0, SLICES), sums + row * slices, n * slices
    lse, share_s = log2_sum_exp(row_sums, plane, 0, LOG2E, slices, SLICES)
    lse_q, lse_t, value, mean = 0.0, 0.0, 0.0, 0.0
    if KIND >= 0:
        lse_q, share_q = log2_sum_exp(row_sums, plane, 2, log2_scale, slices, SLICES)
        if HAS_LSE:
            lse_t = tl.load(teacher_lse + row) * LOG2E
        else:
            lse_t, share_t = log2_sum_exp(row_sums, plane, 4, log2_scale, slices, SLICES)
        if HAS_LSE:
            value = 0.0
        elif KIND < 2:
            acc = tl.load(row_sums + 6 * plane + part_index, mask=part_index < slices, other=0.0)
            if KIND == 0:
                value = tl.sum(acc * share_t) / temperature - (lse_t - lse_q) / LOG2E
            else:
                value = tl.sum(acc * share_q) / temperature - (lse_q - lse_t) / LOG2E
                mean = value
        else:
            value = tl.sum(tl.load(mixed + row * slices + part_index, mask=part_index < slices, other=0.0))
            mean = tl.sum(tl.load(mixed + plane + row * slices + part_index, mask=part_index < slices, other=0.0))
    if tl.program_id(0) == 0:
        tl.store(losses + row, value * temperature * temperature)
        tl.store(losses + n + row, lse / LOG2E - tl.load(row_sums + 7 * plane))
    kd_part, ce_part = tl.load(part_weights).to(tl.float32), tl.load(part_weights + 1).to(tl.float32)
    kd_scale, ce_scale = weight * kd_part * temperature, weight * ce_part
    kd_square, ce_square = tl.zeros((LINES,), tl.float32), tl.zeros((LINES,), tl.float32)
    values = tl.zeros((LINES,), tl.float32)
    for start in range(0, PART, BLOCK):
        cols = start + offsets
        s = read_logits(srow, cols, columns, cap, CAPPED, EVEN)
        if KIND >= 0:
            s_q = s if EVEN else tl.where(cols < shared, s, float("-inf"))
            t = read_logits(trow, cols, shared, teacher_cap, TEACHER_CAPPED, EVEN)
            logq, logp = s_q * log2_scale - lse_q, t * log2_scale - lse_t
            if KIND == 0:
                q, p = tl.exp2(logq), tl.exp2(logp)
                kd_grad = q - p
                if HAS_LSE:
                    term = p * (logp - logq)
                    values += tl.sum(term if EVEN else tl.where(cols < shared, term, 0.0), 1)
            elif KIND == 1:
                q = tl.exp2(logq)
                kd_grad = q * ((logq - logp) / LOG2E - mean)
                kd_grad = kd_grad if EVEN else tl.where(cols < shared, kd_grad, 0.0)
            else:
                value_terms, weighted, q = mixture_terms(logp / LOG2E, logq / LOG2E, cols < shared, share, KIND)
                kd_grad = weighted - q * mean
            kd_square += tl.sum(kd_grad * kd_grad, 1)
        if KIND >= 0 and EVEN and T_IS_2:
            q = q * tl.exp2(lse_q - 0.5 * lse)
            ce_grad = q * q
        elif KIND >= 0 and EVEN and T_IS_1:
            ce_grad = q
        else:
            ce_grad = tl.exp2(s * LOG2E - lse)
        begin = tl.program_id(0) * PART + start
        if (label >= begin) & (label < begin + BLOCK):
            ce_grad = tl.where(cols == label, ce_grad - 1, ce_grad)
        ce_square += tl.sum(ce_grad * ce_grad, 1)
        grad = ce_scale * ce_grad
        if KIND >= 0:
            grad += kd_scale * kd_grad
        if CAPPED:
            grad *= 1 - (s / cap) * (s / cap)
        if weight == 0:  # a masked position may hold anything, NaN as well
            grad = tl.zeros_like(grad)
        if EVEN:
            tl.store(srow + cols, grad.to(student.dtype.element_ty))
        else:
            tl.store(srow + cols, grad.to(student.dtype.element_ty), mask=cols < columns)
    tl.store(squares + row * slices + tl.program_id(0), tl.sum(kd_square))
    tl.store(squares + plane + row * slices + tl.program_id(0), tl.sum(ce_square))
    if HAS_LSE:
        tl.store(squares + 2 * plane + row * slices + tl.program_id(0), tl.sum(values) / LOG2E)
