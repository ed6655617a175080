"""Matrix products of frozen weights in 8-bit floats (e4m3) that include a LoRA matrix in higher precision.

A frozen weight W (N, K) and a LoRA matrix L (N, R) are stored as two quantized matrices:

    wide (N, K + 3R) = [W | hi L | hi L | lo L]        x W' + l L' = [x | hi l | lo l | hi l] wide'
    tall (K + 2R, N) = [W ; hi L' ; lo L']             [g W | g L] = g tall', the two blocks of g L added

hi and lo are an 8-bit value and the rest that it leaves, together about as exact as bfloat16. Each row of either factor
has its own scale, so an outlier costs precision in its own row alone, and no statistics of earlier steps are needed. W
is quantized once, L before each forward. Products accumulate in float32. On the CPU the same numbers are multiplied in
float32.

Shapes: T tokens, K inputs, N outputs, r rank, R rank padded to a multiple of 16.
"""

import torch
from torch import Tensor

FP8_MAX = 448.0  # largest e4m3 value
HEADROOM = 16.0  # largest LoRA value that a row's scale can hold, relative to the row's largest weight
MULTIPLE = 16  # that all matrix dimensions have to be divisible by
PARTS = 4  # tensors of a weight: wide, its scales, tall, its scales
FP8 = torch.float8_e4m3fn


def unsupported_reason(device: torch.device) -> str | None:
    """Why a device cannot multiply 8-bit floats; None for one that can."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        return None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    return f"{name} has no matrix units for 8-bit floats (compute capability 8.9 and later have)"


def padded_rank(rank: int) -> int:
    """R: a rank rounded up to a multiple of 16."""
    return -(-rank // MULTIPLE) * MULTIPLE


def quantize_weight(weight: Tensor, rank: int) -> list[Tensor]:
    """`wide` and `tall` of a weight (N, K) with zeros for L, each followed by its rows' scales (1, rows)."""
    (outputs, inputs), lora_columns = weight.shape, padded_rank(rank)
    wide = torch.zeros((outputs, inputs + 3 * lora_columns), dtype=FP8, device=weight.device)
    tall = torch.zeros((inputs + 2 * lora_columns, outputs), dtype=FP8, device=weight.device)
    row_max = weight.abs().amax(1).float()
    wide_scales = row_max.clamp(min=1e-3 * float(row_max.max())).clamp(min=1e-30) * (HEADROOM / FP8_MAX)
    wide[:, :inputs] = _to_fp8(weight.float() / wide_scales[:, None])
    tall_scales = torch.ones(inputs + 2 * lora_columns, device=weight.device)
    tall_scales[:inputs] = weight.abs().amax(0).float().clamp(min=1e-30) / FP8_MAX
    tall[:inputs] = _to_fp8(weight.float() / tall_scales[:inputs]).t()
    return [wide, wide_scales[None], tall, tall_scales[None]]


def fill_lora(parts: list[Tensor], lora: Tensor, members: int, largest: Tensor) -> None:
    """Writes L into `wide` and `tall`.

    `lora` (N, r) stacks the matrices of `members` equally many rows, which become blocks of a diagonal. `largest` () is
    its largest absolute value.
    """
    wide, wide_scales, tall, tall_scales = parts
    (rows, rank), lora_columns = lora.shape, padded_rank(members * lora.shape[1])
    inputs = len(tall) - 2 * lora_columns
    if lora.is_cuda:
        from tasks.engine.speed.fp8.fp8_kernel import fill_lora as kernel  # noqa: PLC0415  # Triton is where CUDA is

        kernel(wide, wide_scales, tall, tall_scales, lora, members, largest, inputs, lora_columns)
        return
    scale = largest.float().clamp(min=1e-30) / FP8_MAX
    tall_scales[0, inputs:] = scale
    member_rows = rows // members
    for member in range(members):
        rows_slice, rank_columns = (
            slice(member * member_rows, (member + 1) * member_rows),
            slice(member * rank, (member + 1) * rank),
        )
        high, low = _high_and_low(lora[rows_slice].float() / wide_scales[0, rows_slice, None])
        for index, part in enumerate((high, high, low)):
            wide[rows_slice, inputs + index * lora_columns :][:, rank_columns] = part
        high, low = _high_and_low(lora[rows_slice].float() / scale)
        for index, part in enumerate((high, low)):
            tall[inputs + index * lora_columns :][rank_columns, rows_slice] = part.t()


def quantize_with_lora(x: Tensor, lora: Tensor) -> tuple[Tensor, Tensor]:
    """[x | hi l | lo l | hi l] (T, K + 3R) of x (T, K) and l (T, r), and its rows' scales (T, 1)."""
    lora_columns = padded_rank(lora.shape[1])
    if x.is_cuda:
        from tasks.engine.speed.fp8.fp8_kernel import quantize_with_lora as kernel  # noqa: PLC0415

        return kernel(x, lora, lora_columns)
    row_max = torch.maximum(x.abs().amax(1), lora.abs().amax(1)).float()
    scale = (row_max.clamp(min=1e-30) / FP8_MAX)[:, None]
    out = torch.zeros((len(x), x.shape[1] + 3 * lora_columns), dtype=FP8)
    out[:, : x.shape[1]] = _to_fp8(x.float() / scale)
    high, low = _high_and_low(lora.float() / scale)
    for index, part in enumerate((high, low, high)):
        out[:, x.shape[1] + index * lora_columns :][:, : lora.shape[1]] = part
    return out, scale


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (T, K) quantized, and its rows' scales (T, 1), for the CPU: on CUDA the kernel that computes x quantizes it."""
    scale = (x.abs().amax(1).float().clamp(min=1e-30) / FP8_MAX)[:, None]
    return _to_fp8(x.float() / scale), scale


def scaled_matmul(x: Tensor, scale: Tensor, weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """x w' (T, N) of x (T, K) and w (N, K), both quantized by rows with `scale` (T, 1) and `scales` (1, N)."""
    if x.is_cuda:
        rows, padding = len(x), -len(x) % MULTIPLE  # cuBLAS takes multiples of 16
        if padding:
            x = torch.cat([x.view(torch.uint8), x.new_zeros((padding, x.shape[1])).view(torch.uint8)]).view(FP8)
            scale = torch.cat([scale, scale.new_ones((padding, 1))])
        y = torch._scaled_mm(x, weight.t(), scale_a=scale, scale_b=scales, out_dtype=dtype, use_fast_accum=True)
        return y[:rows].contiguous() if padding else y
    return ((x.float() * scale) @ weight.float().t() * scales).to(dtype)


def _to_fp8(x: Tensor) -> Tensor:
    return x.clamp(-FP8_MAX, FP8_MAX).to(FP8)


def _high_and_low(x: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit hi and lo with hi + lo close to x."""
    high = _to_fp8(x)
    return high, _to_fp8(x - high.float())
