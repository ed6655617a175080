"""ggml's tensor types as numbers: what a block holds and costs, and what llama.cpp takes where a row does not fill it.

The table is gguf-py's; a test compares them. No torch and no numpy, for a plan needs no more than this.
"""

from typing import NamedTuple


class TensorType(NamedTuple):
    """A ggml type: its number in files, values a block, bytes a block."""

    id: int
    block: int
    bytes: int


TYPES = {
    "F32": TensorType(0, 1, 4),
    "F16": TensorType(1, 1, 2),
    "BF16": TensorType(30, 1, 2),
    "Q4_0": TensorType(2, 32, 18),
    "Q4_1": TensorType(3, 32, 20),
    "Q5_0": TensorType(6, 32, 22),
    "Q5_1": TensorType(7, 32, 24),
    "Q8_0": TensorType(8, 32, 34),
    "Q2_K": TensorType(10, 256, 84),
    "Q3_K": TensorType(11, 256, 110),
    "Q4_K": TensorType(12, 256, 144),
    "Q5_K": TensorType(13, 256, 176),
    "Q6_K": TensorType(14, 256, 210),
    "IQ2_XXS": TensorType(16, 256, 66),
    "IQ2_XS": TensorType(17, 256, 74),
    "IQ3_XXS": TensorType(18, 256, 98),
    "IQ1_S": TensorType(19, 256, 50),
    "IQ4_NL": TensorType(20, 32, 18),
    "IQ3_S": TensorType(21, 256, 110),
    "IQ2_S": TensorType(22, 256, 82),
    "IQ4_XS": TensorType(23, 256, 136),
    "IQ1_M": TensorType(29, 256, 56),
}
FLOATS = ("F32", "F16", "BF16")

# The type with blocks of 32 that llama.cpp takes where a row is no multiple of 256 (llama-quant.cpp).
FALLBACK = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}


def fitting(wanted: str, row: int) -> str:
    """`wanted` where rows of `row` values fill its blocks, else llama.cpp's fallback; F16 where nothing fits."""
    if row % TYPES[wanted].block == 0:
        return wanted
    found = FALLBACK.get(wanted, "F16")
    return found if row % TYPES[found].block == 0 else "F16"


def tensor_bytes(type_: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; `shape` with the row length first."""
    values = 1
    for size in shape:
        values *= size
    return values // TYPES[type_].block * TYPES[type_].bytes
