"""ggml's quantizers, called with ctypes from the library in the xllamacpp wheel: the code of llama.cpp itself.

ggml aborts the process on bad input: rows have to be finite, and to fill the type's blocks.
"""

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tasks.core.errors import BadConfig
from tasks.engine.runtimes.ggml_types import FLOATS, TYPES

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@cache
def library() -> ctypes.CDLL:
    """The shared library, its functions declared."""
    spec = importlib.util.find_spec("xllamacpp")
    files = sorted(Path(spec.origin).parent.glob("xllamacpp*.so")) if spec and spec.origin else []
    if not files:
        raise BadConfig("llama.cpp's quantizers are not installed: pip install xllamacpp")
    ggml = ctypes.CDLL(str(files[0]))
    pointer, int64 = ctypes.c_void_p, ctypes.c_int64
    ggml.ggml_quantize_init.argtypes = [ctypes.c_int]
    ggml.ggml_quantize_init.restype = None
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, int64, int64, int64, pointer]
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_validate_row_data.argtypes = [ctypes.c_int, pointer, ctypes.c_size_t]
    ggml.ggml_validate_row_data.restype = ctypes.c_bool
    ggml.ggml_fp32_to_bf16_row_ref.argtypes = [pointer, pointer, int64]
    ggml.ggml_fp32_to_bf16_row_ref.restype = None
    return ggml


def init_quantizer(type_: str) -> None:
    """Builds the tables of a type's quantizer; call once before threads use it."""
    library().ggml_quantize_init(TYPES[type_].id)


def to_type(rows: Floats, type_: str, imatrix: Floats | None = None) -> Bytes:
    """`rows` [n, row length] as bytes of `type_`; `imatrix` [row length] weighs the columns' squared errors.

    Raises ValueError for an invalid result (NaN or infinite scales).
    """
    rows = np.ascontiguousarray(rows, np.float32)
    if type_ == "F32":
        return rows.view(np.uint8).reshape(-1)
    if type_ == "F16":
        with np.errstate(over="ignore"):  # overflows to infinity, as in llama.cpp; the proof reports it
            return rows.astype(np.float16).view(np.uint8).reshape(-1)
    if type_ == "BF16":
        out = np.empty(2 * rows.size, np.uint8)
        library().ggml_fp32_to_bf16_row_ref(rows.ctypes.data, out.ctypes.data, rows.size)
        return out
    out = _quantized(rows, type_, imatrix)
    if not library().ggml_validate_row_data(TYPES[type_].id, out.ctypes.data, out.nbytes):
        raise ValueError(f"ggml's {type_} of these values is not valid: the model holds NaN or infinite weights")
    return out


def to_floats(data: Bytes, type_: str) -> Floats:
    """Stored F32, F16 or BF16 values as float32, flat."""
    if type_ == "F32":
        return data.view(np.float32)
    if type_ == "F16":
        return data.view(np.float16).astype(np.float32)
    if type_ != "BF16":
        raise BadConfig(f"weights are quantized from {', '.join(FLOATS)}, not from {type_}")
    bits = data.view(np.uint16).astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def round_trip(type_: str, rows: Floats) -> Floats:
    """Quantizes finite rows [n, row length] to `type_` and back, as llama.cpp dequantizes them."""
    rows = np.ascontiguousarray(rows, np.float32)
    quantized, values = _quantized(rows, type_), np.empty_like(rows)
    dequantize = getattr(library(), f"dequantize_row_{type_.lower().replace('_k', '_K')}")
    dequantize(ctypes.c_void_p(quantized.ctypes.data), ctypes.c_void_p(values.ctypes.data), ctypes.c_int64(rows.size))
    return values


def _quantized(rows: Floats, type_: str, imatrix: Floats | None = None) -> Bytes:
    out = np.empty(rows.size // TYPES[type_].block * TYPES[type_].bytes, np.uint8)
    weights = None if imatrix is None else np.ascontiguousarray(imatrix, np.float32)
    pointer = None if weights is None else weights.ctypes.data
    size = library().ggml_quantize_chunk(
        TYPES[type_].id, rows.ctypes.data, out.ctypes.data, 0, len(rows), rows.shape[-1], pointer
    )
    if size != out.nbytes:
        raise ValueError(f"ggml wrote {size} bytes of {type_} for rows of {rows.shape[-1]} values, not {out.nbytes}")
    return out
