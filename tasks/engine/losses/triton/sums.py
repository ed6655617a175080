# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""First kernel: maxima and softmax sums of a part's logits at temperatures 1 and T, and a KL's value, all online."""

import triton
import triton.language as tl

from tasks.engine.losses.triton.tile import LOG2E, WIDE, finite, read_logits

SUMS = tl.constexpr(8)  # of a part: maxima and sums of exp at 1, of student and teacher at T, the value's; the label's


@triton.jit
def softmax_sums(
    student, teacher, labels, sums, n, student_stride, teacher_stride, columns, shared, temperature, share, cap,
    teacher_cap, KIND: tl.constexpr, CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, EVEN: tl.constexpr,
    PART: tl.constexpr, BLOCK: tl.constexpr, T_IS_2: tl.constexpr, T_IS_1: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Writes `sums` (SUMS, n, parts); with HAS_LSE the teacher is not read and its planes are not written."""
    row = tl.program_id(1)
    srow, trow = student + row.to(tl.int64) * student_stride, teacher + row.to(tl.int64) * teacher_stride
    LINES: tl.constexpr = BLOCK // WIDE
    offsets = tl.arange(0, LINES)[:, None] * WIDE + tl.arange(0, WIDE)[None, :] + tl.program_id(0) * PART
    log2_scale = LOG2E / temperature
    minus_inf = tl.full((LINES,), float("-inf"), tl.float32)
    m, m_q, m_t = minus_inf, minus_inf, minus_inf
    z, z_q = tl.zeros((LINES,), tl.float32), tl.zeros((LINES,), tl.float32)
    z_t, acc = tl.zeros((LINES,), tl.float32), tl.zeros((LINES,), tl.float32)
    for start in range(0, PART, BLOCK):
        cols = start + offsets
        s = read_logits(srow, cols, columns, cap, CAPPED, EVEN)
        high = tl.maximum(m, tl.max(s, 1))
        base = high if EVEN else finite(high)
        if KIND >= 0:
            s_q = s
            if EVEN:
                high_q = high
            else:
                s_q = tl.where(cols < shared, s, float("-inf"))
                high_q = tl.maximum(m_q, tl.max(s_q, 1))
            base_q = high_q if EVEN else finite(high_q)
            e_q = tl.exp2(s_q * log2_scale - (base_q * log2_scale)[:, None])
            rescale_q = tl.exp2((m_q - base_q) * log2_scale)
            z_q = z_q * rescale_q + tl.sum(e_q, 1)
            if not HAS_LSE:
                t = read_logits(trow, cols, shared, teacher_cap, TEACHER_CAPPED, EVEN)
                high_t = tl.maximum(m_t, tl.max(t, 1))
                base_t = high_t if EVEN else finite(high_t)
                e_t = tl.exp2(t * log2_scale - (base_t * log2_scale)[:, None])
                rescale_t = tl.exp2((m_t - base_t) * log2_scale)
                z_t = z_t * rescale_t + tl.sum(e_t, 1)
                if KIND == 0:
                    term = e_t * (t - s_q)
                    acc = acc * rescale_t + tl.sum(term if EVEN else tl.where(cols < shared, term, 0.0), 1)
                elif KIND == 1:
                    term = e_q * (s_q - t)
                    acc = acc * rescale_q + tl.sum(term if EVEN else tl.where(cols < shared, term, 0.0), 1)
                m_t = high_t
            m_q = high_q
        if KIND >= 0 and EVEN and T_IS_2:
            e = e_q * e_q
        elif KIND >= 0 and EVEN and T_IS_1:
            e = e_q
        else:
            e = tl.exp2(s * LOG2E - (base * LOG2E)[:, None])
        z = z * tl.exp2((m - base) * LOG2E) + tl.sum(e, 1)
        m = high
    slices = tl.num_programs(0)
    out, plane = sums + row * slices + tl.program_id(0), n * slices
    top = tl.max(m)
    tl.store(out, top)
    tl.store(out + plane, tl.sum(z * tl.exp2((m - finite(top)) * LOG2E)))
    if KIND >= 0:
        top_q = tl.max(m_q)
        share_q = tl.exp2((m_q - finite(top_q)) * log2_scale)
        tl.store(out + 2 * plane, top_q)
        tl.store(out + 3 * plane, tl.sum(z_q * share_q))
        if not HAS_LSE:
            top_t = tl.max(m_t)
            share_t = tl.exp2((m_t - finite(top_t)) * log2_scale)
            tl.store(out + 4 * plane, top_t)
            tl.store(out + 5 * plane, tl.sum(z_t * share_t))
            if KIND == 0:
                tl.store(out + 6 * plane, tl.sum(acc * share_t))
            elif KIND == 1:
                tl.store(out + 6 * plane, tl.sum(acc * share_q))
    if tl.program_id(0) == 0:
        label_logit = tl.load(srow + tl.maximum(tl.load(labels + row), 0)).to(tl.float32)
        if CAPPED:
            label_logit = cap * (2 * tl.sigmoid(2 * label_logit / cap) - 1)
        tl.store(out + 7 * plane, label_logit)
