# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""The formulas as Triton kernels for CUDA: a chunk's logits of student and teacher in, the gradient in their place.

Two passes over the logits: one takes the maxima, the softmax sums at temperatures 1 and T and the divergence's value
online; one writes the gradient over the student's logits. Where the teacher's sums are known, forward_kl reads the
teacher in the second pass alone, which then makes its value too. The mixtures (jsd, skew) need the sums before their
value: a third. A row is cut into parts, a program each, so that no multiprocessor waits for the last rows.

A block is a tile of LINES x 8 logits, and each line keeps a maximum and sums of its own until the part is over: threads
do not wait for each other, and the sums take an eighth of the registers.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tasks.engine.losses.mix import Head, Mix

CODES = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2, "skew_kl": 3, "skew_reverse_kl": 4}
BLOCK, WARPS = 4096, 8
PART = 32768  # columns of a program
WIDE = tl.constexpr(8)  # logits of a line: 16 bytes, what a thread loads at once
LOG2E = tl.constexpr(1.4426950408889634)
SUMS = tl.constexpr(8)  # of a part: maxima and sums of exp at 1, of student and teacher at T, the value's; the label's


def chunk_losses(
    products: Tensor,
    head: Head,
    labels: Tensor,
    weights: Tensor,
    teacher: Tensor | None,
    teacher_softcap: float | None,
    mix: Mix,
    parts: Tensor,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `tasks.engine.losses.divergence.chunk_losses`, but `products` (n, V) turns into the gradient.

    `teacher` (n, W) are products too: its softcap is applied here. `lse` (n,) is its log-sum-exp at the temperature,
    where that is known.
    """
    n, columns = products.shape
    known = products if teacher is None else teacher
    shared, slices = min(columns, known.shape[1]), triton.cdiv(columns, PART)
    numbers = torch.empty((4, n), dtype=torch.float32, device=products.device)
    sums, squares = numbers.new_empty((SUMS.value, n, slices)), numbers.new_empty((3, n, slices))
    kind = -1 if teacher is None else CODES[mix.divergence]
    mixed = numbers.new_empty((2, n, slices)) if kind > 1 else sums
    later = kind == 0 and lse is not None and shared == known.shape[1]
    same: dict[str, Any] = dict(
        n=n, student_stride=products.stride(0), teacher_stride=known.stride(0), columns=columns, shared=shared,
        temperature=mix.temperature, share=mix.beta if mix.divergence == "jsd" else mix.skew, cap=head.softcap or 1.0,
        teacher_cap=teacher_softcap or 1.0, KIND=kind, CAPPED=head.softcap is not None,
        TEACHER_CAPPED=teacher_softcap is not None, EVEN=columns % PART == 0 and shared == columns,
        PART=PART, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    quick: dict[str, Any] = dict(T_IS_2=mix.temperature == 2, T_IS_1=mix.temperature == 1)
    grid = (slices, n)
    _sums[grid](products, known, labels, sums, LATER=later, **same, **quick)
    if kind > 1:
        _values[grid](products, known, sums, mixed, SLICES=_power(slices), **same)
    _gradient[grid](
        products, known, labels, weights, parts, sums, mixed, lse if later else weights, squares, numbers,
        LATER=later, SLICES=_power(slices), **same, **quick,
    )  # fmt: skip
    found = squares.sum(-1)
    torch.sqrt(found[:2], out=numbers[2:])
    numbers[2] *= mix.temperature
    if later:
        torch.mul(found[2], mix.temperature**2, out=numbers[0])
    return products, numbers


def _power(n: int) -> int:
    return int(triton.next_power_of_2(n))


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
def _sums(
    student, teacher, labels, sums, n, student_stride, teacher_stride, columns, shared, temperature, share, cap,
    teacher_cap, KIND: tl.constexpr, CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, EVEN: tl.constexpr,
    PART: tl.constexpr, BLOCK: tl.constexpr, T_IS_2: tl.constexpr, T_IS_1: tl.constexpr, LATER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    srow, trow = student + row.to(tl.int64) * student_stride, teacher + row.to(tl.int64) * teacher_stride
    LINES: tl.constexpr = BLOCK // WIDE
    lanes = tl.arange(0, LINES)[:, None] * WIDE + tl.arange(0, WIDE)[None, :] + tl.program_id(0) * PART
    cold = LOG2E / temperature
    none = tl.full((LINES,), float("-inf"), tl.float32)
    m, m_q, m_t = none, none, none
    z, z_q = tl.zeros((LINES,), tl.float32), tl.zeros((LINES,), tl.float32)
    z_t, acc = tl.zeros((LINES,), tl.float32), tl.zeros((LINES,), tl.float32)
    for start in range(0, PART, BLOCK):
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
            base_q = high_q if EVEN else _finite(high_q)
            e_q = tl.exp2(s_q * cold - (base_q * cold)[:, None])
            fade_q = tl.exp2((m_q - base_q) * cold)
            z_q = z_q * fade_q + tl.sum(e_q, 1)
            if not LATER:
                t = _read(trow, cols, shared, teacher_cap, TEACHER_CAPPED, EVEN)
                high_t = tl.maximum(m_t, tl.max(t, 1))
                base_t = high_t if EVEN else _finite(high_t)
                e_t = tl.exp2(t * cold - (base_t * cold)[:, None])
                fade_t = tl.exp2((m_t - base_t) * cold)
                z_t = z_t * fade_t + tl.sum(e_t, 1)
                if KIND == 0:
                    term = e_t * (t - s_q)
                    acc = acc * fade_t + tl.sum(term if EVEN else tl.where(cols < shared, term, 0.0), 1)
                elif KIND == 1:
                    term = e_q * (s_q - t)
                    acc = acc * fade_q + tl.sum(term if EVEN else tl.where(cols < shared, term, 0.0), 1)
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
    tl.store(out + plane, tl.sum(z * tl.exp2((m - _finite(top)) * LOG2E)))
    if KIND >= 0:
        top_q = tl.max(m_q)
        share_q = tl.exp2((m_q - _finite(top_q)) * cold)
        tl.store(out + 2 * plane, top_q)
        tl.store(out + 3 * plane, tl.sum(z_q * share_q))
        if not LATER:
            top_t = tl.max(m_t)
            share_t = tl.exp2((m_t - _finite(top_t)) * cold)
            tl.store(out + 4 * plane, top_t)
            tl.store(out + 5 * plane, tl.sum(z_t * share_t))
            if KIND == 0:
                tl.store(out + 6 * plane, tl.sum(acc * share_t))
            elif KIND == 1:
                tl.store(out + 6 * plane, tl.sum(acc * share_q))
    if tl.program_id(0) == 0:
        picked = tl.load(srow + tl.maximum(tl.load(labels + row), 0)).to(tl.float32)
        if CAPPED:
            picked = cap * (2 * tl.sigmoid(2 * picked / cap) - 1)
        tl.store(out + 7 * plane, picked)


@triton.jit
def _together(out, plane, which, cold, slices, SLICES: tl.constexpr):
    """log2 of a row's sum of exp over its parts, by parts' maxima in `which` and sums after it; the parts' shares."""
    at = tl.arange(0, SLICES)
    tops = tl.load(out + which * plane + at, mask=at < slices, other=float("-inf"))
    part = tl.load(out + (which + 1) * plane + at, mask=at < slices, other=0.0)
    top = tl.max(tops)
    fades = tl.exp2((tops - top) * cold)
    total = tl.sum(part * fades)
    return top * cold + tl.log2(total), fades / total


@triton.jit
def _values(
    student, teacher, sums, mixed, n, student_stride, teacher_stride, columns, shared, temperature, share, cap,
    teacher_cap, KIND: tl.constexpr, CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, EVEN: tl.constexpr,
    PART: tl.constexpr, BLOCK: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """A part's terms of a mixture's divergence and of the sum of q dD/dq."""
    row, slices = tl.program_id(1), tl.num_programs(0)
    srow, trow = student + row.to(tl.int64) * student_stride, teacher + row.to(tl.int64) * teacher_stride
    LINES: tl.constexpr = BLOCK // WIDE
    lanes = tl.arange(0, LINES)[:, None] * WIDE + tl.arange(0, WIDE)[None, :] + tl.program_id(0) * PART
    cold = LOG2E / temperature
    lse_q, share_q = _together(sums + row * slices, n * slices, 2, cold, slices, SLICES)
    lse_t, share_t = _together(sums + row * slices, n * slices, 4, cold, slices, SLICES)
    values, weighteds = tl.zeros((LINES,), tl.float32), tl.zeros((LINES,), tl.float32)
    for start in range(0, PART, BLOCK):
        cols = start + lanes
        logq = (_read(srow, cols, shared, cap, CAPPED, EVEN) * cold - lse_q) / LOG2E
        logp = (_read(trow, cols, shared, teacher_cap, TEACHER_CAPPED, EVEN) * cold - lse_t) / LOG2E
        one, weighted, q = _mixed(logp, logq, cols < shared, share, KIND)
        values, weighteds = values + tl.sum(one, 1), weighteds + tl.sum(weighted, 1)
    out = mixed + row * slices + tl.program_id(0)
    tl.store(out, tl.sum(values))
    tl.store(out + n * slices, tl.sum(weighteds))


@triton.jit
def _gradient(
    student, teacher, labels, weights, parts, sums, mixed, known_lse, squares, numbers, n, student_stride,
    teacher_stride, columns, shared, temperature, share, cap, teacher_cap, KIND: tl.constexpr, CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr, EVEN: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, SLICES: tl.constexpr,
    T_IS_2: tl.constexpr, T_IS_1: tl.constexpr, LATER: tl.constexpr,
):  # fmt: skip
    row, slices = tl.program_id(1), tl.num_programs(0)
    srow, trow = student + row.to(tl.int64) * student_stride, teacher + row.to(tl.int64) * teacher_stride
    label, weight = tl.load(labels + row), tl.load(weights + row)
    LINES: tl.constexpr = BLOCK // WIDE
    lanes = tl.arange(0, LINES)[:, None] * WIDE + tl.arange(0, WIDE)[None, :] + tl.program_id(0) * PART
    cold = LOG2E / temperature
    at, own, plane = tl.arange(0, SLICES), sums + row * slices, n * slices
    lse, share_s = _together(own, plane, 0, LOG2E, slices, SLICES)
    lse_q, lse_t, value, mean = 0.0, 0.0, 0.0, 0.0
    if KIND >= 0:
        lse_q, share_q = _together(own, plane, 2, cold, slices, SLICES)
        if LATER:
            lse_t = tl.load(known_lse + row) * LOG2E
        else:
            lse_t, share_t = _together(own, plane, 4, cold, slices, SLICES)
        if LATER:
            value = 0.0
        elif KIND < 2:
            acc = tl.load(own + 6 * plane + at, mask=at < slices, other=0.0)
            if KIND == 0:
                value = tl.sum(acc * share_t) / temperature - (lse_t - lse_q) / LOG2E
            else:
                value = tl.sum(acc * share_q) / temperature - (lse_q - lse_t) / LOG2E
                mean = value
        else:
            value = tl.sum(tl.load(mixed + row * slices + at, mask=at < slices, other=0.0))
            mean = tl.sum(tl.load(mixed + plane + row * slices + at, mask=at < slices, other=0.0))
    if tl.program_id(0) == 0:
        tl.store(numbers + row, value * temperature * temperature)
        tl.store(numbers + n + row, lse / LOG2E - tl.load(own + 7 * plane))
    kd_part, ce_part = tl.load(parts).to(tl.float32), tl.load(parts + 1).to(tl.float32)
    kd_scale, ce_scale = weight * kd_part * temperature, weight * ce_part
    kd_square, ce_square = tl.zeros((LINES,), tl.float32), tl.zeros((LINES,), tl.float32)
    values = tl.zeros((LINES,), tl.float32)
    for start in range(0, PART, BLOCK):
        cols = start + lanes
        s = _read(srow, cols, columns, cap, CAPPED, EVEN)
        if KIND >= 0:
            s_q = s if EVEN else tl.where(cols < shared, s, float("-inf"))
            t = _read(trow, cols, shared, teacher_cap, TEACHER_CAPPED, EVEN)
            logq, logp = s_q * cold - lse_q, t * cold - lse_t
            if KIND == 0:
                q, p = tl.exp2(logq), tl.exp2(logp)
                slope = q - p
                if LATER:
                    term = p * (logp - logq)
                    values += tl.sum(term if EVEN else tl.where(cols < shared, term, 0.0), 1)
            elif KIND == 1:
                q = tl.exp2(logq)
                slope = q * ((logq - logp) / LOG2E - mean)
                slope = slope if EVEN else tl.where(cols < shared, slope, 0.0)
            else:
                one, weighted, q = _mixed(logp / LOG2E, logq / LOG2E, cols < shared, share, KIND)
                slope = weighted - q * mean
            kd_square += tl.sum(slope * slope, 1)
        if KIND >= 0 and EVEN and T_IS_2:
            q = q * tl.exp2(lse_q - 0.5 * lse)
            hard = q * q
        elif KIND >= 0 and EVEN and T_IS_1:
            hard = q
        else:
            hard = tl.exp2(s * LOG2E - lse)
        begin = tl.program_id(0) * PART + start
        if (label >= begin) & (label < begin + BLOCK):
            hard = tl.where(cols == label, hard - 1, hard)
        ce_square += tl.sum(hard * hard, 1)
        grad = ce_scale * hard
        if KIND >= 0:
            grad += kd_scale * slope
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
    if LATER:
        tl.store(squares + 2 * plane + row * slices + tl.program_id(0), tl.sum(values) / LOG2E)
