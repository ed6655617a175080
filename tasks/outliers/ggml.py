"""ggml's own quantizers, called in the shared library that xllamacpp brings.

back = round_trip("Q4_K", rows)     # [n, width] float32 -> the same rows as llama.cpp would read them back
"""

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import gguf
import torch
from torch import Tensor

from tasks.core.errors import BadConfig

# What llama.cpp takes where a row is no multiple of 256 (llama-quant.cpp, tensor_type_fallback).
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def becomes(kind: str, width: int) -> str | None:
    """The type that rows of `width` values really get when `kind` is asked for; None where even 32 does not divide."""
    if width % 32:
        return None
    return FALLBACK[kind] if kind in FALLBACK and width % 256 else kind


def round_trip(kind: str, rows: Tensor) -> Tensor:
    """Finite float32 rows [n, width], quantized to ggml's `kind` and back; width has to be a multiple of its block."""
    rows = rows.contiguous()
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    packed = torch.empty(rows.numel() // block * block_bytes, dtype=torch.uint8)
    back = torch.empty_like(rows)
    library = _library()
    library.ggml_quantize_chunk(
        int(gguf.GGMLQuantizationType[kind]), rows.data_ptr(), packed.data_ptr(), 0, len(rows), rows.shape[-1], None
    )
    dequantize = getattr(library, f"dequantize_row_q{kind[1:]}")
    dequantize(ctypes.c_void_p(packed.data_ptr()), ctypes.c_void_p(back.data_ptr()), ctypes.c_int64(rows.numel()))
    return back


@cache
def _library() -> ctypes.CDLL:
    found = importlib.util.find_spec("xllamacpp")
    files = sorted(Path(found.origin).parent.glob("*.so")) if found and found.origin else []
    if not files:
        raise BadConfig("llama.cpp's quantizers are not installed: pip install xllamacpp")
    library = ctypes.CDLL(str(files[0]))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, long = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, long, long, long, pointer]
    return library
