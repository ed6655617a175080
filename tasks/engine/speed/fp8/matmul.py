"""Products of frozen weights in 8-bit floats (e4m3), with their adapters' low ranks riding along.

A weight W (N, K) and its low rank L (N, R) (tasks.engine.speed.fp8.mlp_fp8 says which) are kept as two matrices:

    wide (N, K + 3R) = [W | hi L | hi L | lo L]        x W' + l L' = [x | hi l | lo l | hi l] wide'
    tall (K + 2R, N) = [W ; hi L' ; lo L']             [g W | g L] = g tall', the last 2R columns added up

Each row of either side has its own scale, so an outlier costs its own row precision, and no statistics of earlier
steps are needed. L is kept as the sum of two numbers of 4 bits, about as exact as a bfloat16. W is quantized once, L
whenever the adapters have moved. Sums are float32. On the CPU the same numbers are multiplied in float32.
"""

import torch
from torch import Tensor

LARGEST = 448.0  # of e4m3
HEADROOM = 16.0  # a low rank's part may be so many times its row's largest weight
MULTIPLE = 16  # of widths, for the matrix units
PARTS = 4  # tensors that make up a weight
SMALL = torch.float8_e4m3fn


def refused(device: torch.device) -> str | None:
    """Why a device does not multiply in 8 bits; None for one that does."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        return None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    return f"{name} has no matrix units for 8-bit floats (compute capability 8.9 and later have)"


def padded(rank: int) -> int:
    """R, the columns kept for low ranks."""
    return -(-rank // MULTIPLE) * MULTIPLE


def quantize_weight(weight: Tensor, rank: int) -> list[Tensor]:
    """wide and tall of a weight (N, K) with room for a low rank, each followed by its rows' scales (1, rows)."""
    (outputs, inputs), room = weight.shape, padded(rank)
    wide = torch.zeros((outputs, inputs + 3 * room), dtype=SMALL, device=weight.device)
    tall = torch.zeros((inputs + 2 * room, outputs), dtype=SMALL, device=weight.device)
    most = weight.abs().amax(1).float()
    wide_scales = most.clamp(min=1e-3 * float(most.max())).clamp(min=1e-30) * (HEADROOM / LARGEST)
    wide[:, :inputs] = _small(weight.float() / wide_scales[:, None])
    tall_scales = torch.ones(inputs + 2 * room, device=weight.device)
    tall_scales[:inputs] = weight.abs().amax(0).float().clamp(min=1e-30) / LARGEST
    tall[:inputs] = _small(weight.float() / tall_scales[:inputs]).t()
    return [wide, wide_scales[None], tall, tall_scales[None]]


def fill(parts: list[Tensor], low: Tensor, members: int, most: Tensor) -> None:
    """Puts the low rank into wide and tall; `low` (N, r) holds those of `members` equal shares of the rows, which have
    columns of their own. `most` () is its largest absolute value."""
    wide, wide_scales, tall, tall_scales = parts
    (rows, rank), room = low.shape, padded(members * low.shape[1])
    inputs = len(tall) - 2 * room
    if low.is_cuda:
        from tasks.engine.speed.fp8.fp8_kernel import fill as kernel  # noqa: PLC0415  # Triton is where CUDA is

        kernel(wide, wide_scales, tall, tall_scales, low, members, most, inputs, room)
        return
    scale = most.float().clamp(min=1e-30) / LARGEST
    tall_scales[0, inputs:] = scale
    share = rows // members
    for member in range(members):
        at, columns = slice(member * share, (member + 1) * share), slice(member * rank, (member + 1) * rank)
        high, rest = _halves(low[at].float() / wide_scales[0, at, None])
        for place, part in enumerate((high, high, rest)):
            wide[at, inputs + place * room :][:, columns] = part
        high, rest = _halves(low[at].float() / scale)
        for place, part in enumerate((high, rest)):
            tall[inputs + place * room :][columns, at] = part.t()


def quantize(x: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """[x | hi l | lo l | hi l] of x (M, K) and l (M, r), and its rows' scales (M, 1)."""
    room = padded(low.shape[1])
    if x.is_cuda:
        from tasks.engine.speed.fp8.fp8_kernel import quantize as kernel  # noqa: PLC0415

        return kernel(x, low, room)
    most = torch.maximum(x.abs().amax(1), low.abs().amax(1)).float()
    scale = (most.clamp(min=1e-30) / LARGEST)[:, None]
    out = torch.zeros((len(x), x.shape[1] + 3 * room), dtype=SMALL)
    out[:, : x.shape[1]] = _small(x.float() / scale)
    high, rest = _halves(low.float() / scale)
    for place, part in enumerate((high, rest, high)):
        out[:, x.shape[1] + place * room :][:, : low.shape[1]] = part
    return out, scale


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) and its rows' scales (M, 1), in plain torch: on CUDA the kernels that make x quantize it."""
    scale = (x.abs().amax(1).float().clamp(min=1e-30) / LARGEST)[:, None]
    return _small(x.float() / scale), scale


def product(x: Tensor, scale: Tensor, weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(M, N) = x w' of x (M, K) and w (N, K), both quantized by rows."""
    if x.is_cuda:
        rows, more = len(x), -len(x) % MULTIPLE  # cuBLAS wants multiples of 16
        if more:
            x = torch.cat([x.view(torch.uint8), x.new_zeros((more, x.shape[1])).view(torch.uint8)]).view(SMALL)
            scale = torch.cat([scale, scale.new_ones((more, 1))])
        y = torch._scaled_mm(x, weight.t(), scale_a=scale, scale_b=scales, out_dtype=dtype, use_fast_accum=True)
        return y[:rows].contiguous() if more else y
    return ((x.float() * scale) @ weight.float().t() * scales).to(dtype)


def _small(x: Tensor) -> Tensor:
    return x.clamp(-LARGEST, LARGEST).to(SMALL)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """A number as the sum of two small ones."""
    high = _small(x)
    return high, _small(x - high.float())
