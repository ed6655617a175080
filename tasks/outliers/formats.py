"""Error that each quantized format makes in a matrix: ggml's types by ggml itself, NF4 and int8 as in bitsandbytes.

Errors are root-mean-square of the difference over root-mean-square of the values, on rows spread over the tensor.
"""

import torch
from torch import Tensor

from tasks.engine.runtimes.ggml import round_trip
from tasks.engine.runtimes.ggml_types import FLOATS, fitting_type

GGML = {"q8_0": "Q8_0", "q4_0": "Q4_0", "q4_k": "Q4_K", "q6_k": "Q6_K"}
FORMATS = (*GGML, "nf4", "int8")
NF4_BLOCK = 64
# QLoRA's 16 normal-float values (arXiv 2305.14314, appendix E).
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def errors(rows: Tensor, importance: Tensor | None = None) -> dict[str, float]:
    """Relative error of each format that can hold `rows` [n, width]; `importance` [width] weighs the channels.

    With the mean squares of a layer's inputs as importance it is the error of the layer's output, if channels are
    independent (llama.cpp's importance matrix rests on the same).
    """
    weight = torch.ones(rows.shape[-1]) if importance is None else importance.float()
    energy = float((rows.square().mean(0) * weight).sum())
    relative = {}
    for name in FORMATS:
        restored = round_trip_rows(name, rows)
        if restored is not None:
            noise = float(((restored - rows).square().mean(0) * weight).sum())
            relative[name] = (noise / energy) ** 0.5 if energy else 0.0
    return relative


def round_trip_rows(name: str, rows: Tensor) -> Tensor | None:
    """Finite float32 rows quantized to a format and dequantized; None where it cannot hold rows of this width."""
    if name == "int8":
        return _int8(rows)
    if name == "nf4":
        return _nf4(rows) if rows.numel() % NF4_BLOCK == 0 else None
    kind = actual_type(GGML[name], rows.shape[-1])
    return torch.from_numpy(round_trip(kind, rows.numpy())) if kind else None


def actual_type(kind: str, width: int) -> str | None:
    """The ggml type that rows of `width` values get when `kind` is requested; None where no block size divides it."""
    actual = fitting_type(kind, width)
    return None if actual in FLOATS else actual


def _int8(rows: Tensor) -> Tensor:
    """One scale an output row, 127 steps to its largest magnitude (LLM.int8, arXiv 2208.07339)."""
    scale = rows.abs().amax(-1, keepdim=True).clamp(min=1e-38) / 127
    return (rows / scale).round_().mul_(scale)


def _nf4(rows: Tensor) -> Tensor:
    """Blocks of 64 along the flattened rows, each scaled by its largest magnitude; the scale stays exact."""
    blocks = rows.reshape(-1, NF4_BLOCK)
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-38)
    scaled, code = blocks / scale, torch.zeros(blocks.shape, dtype=torch.uint8)
    for threshold in ((NF4[1:] + NF4[:-1]) / 2).tolist():  # a fourth of bucketize's time
        code += scaled > threshold
    return NF4[code.int()].mul_(scale).reshape(rows.shape)
