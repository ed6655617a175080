"""ggml's tensor types as numbers: block sizes, fallbacks for rows that fill no block, and use of importance matrices.

Numbers are gguf-py's, which a test compares. No torch and no numpy: configs and conversion plans import this.
"""

from typing import NamedTuple


class TensorType(NamedTuple):
    """A ggml type: its number in files, values per block, bytes per block.

    `fallback` is the type that llama.cpp takes where a row does not fill the blocks (llama-quant.cpp). `needs_imatrix`:
    llama.cpp refuses to make it without an importance matrix. `weighs`: ggml weighs its rounding by one.
    """

    id: int
    block: int
    bytes: int
    fallback: str = "F16"
    needs_imatrix: bool = False
    weighs: bool = True


TYPES = {
    "F32": TensorType(0, 1, 4, weighs=False),
    "F16": TensorType(1, 1, 2, weighs=False),
    "BF16": TensorType(30, 1, 2, weighs=False),
    "Q8_0": TensorType(8, 32, 34, weighs=False),
    "Q6_K": TensorType(14, 256, 210, "Q8_0"),
    "Q5_K": TensorType(13, 256, 176, "Q5_1"),
    "Q5_1": TensorType(7, 32, 24),
    "Q5_0": TensorType(6, 32, 22),
    "Q4_K": TensorType(12, 256, 144, "Q5_0"),
    "Q4_1": TensorType(3, 32, 20),
    "Q4_0": TensorType(2, 32, 18),
    "IQ4_NL": TensorType(20, 32, 18),
    "IQ4_XS": TensorType(23, 256, 136, "IQ4_NL"),
    "Q3_K": TensorType(11, 256, 110, "Q4_0"),
    "IQ3_S": TensorType(21, 256, 110, "IQ4_NL"),
    "IQ3_XXS": TensorType(18, 256, 98, "IQ4_NL", needs_imatrix=True),
    "Q2_K": TensorType(10, 256, 84, "Q4_0"),
    "IQ2_S": TensorType(22, 256, 82, "IQ4_NL", needs_imatrix=True),
    "IQ2_XS": TensorType(17, 256, 74, "IQ4_NL", needs_imatrix=True),
    "IQ2_XXS": TensorType(16, 256, 66, "IQ4_NL", needs_imatrix=True),
    "IQ1_M": TensorType(29, 256, 56, "IQ4_NL", needs_imatrix=True),
    "IQ1_S": TensorType(19, 256, 50, "IQ4_NL", needs_imatrix=True),
}
"""By name, in the order of the config's form: most bits first."""
FLOATS = ("F32", "F16", "BF16")


def fitting_type(type_: str, row: int) -> str:
    """`type_` where rows of `row` values fill its blocks, else llama.cpp's fallback; F16 where that does not fit."""
    if row % TYPES[type_].block == 0:
        return type_
    fallback = TYPES[type_].fallback
    return fallback if row % TYPES[fallback].block == 0 else "F16"


def tensor_bytes(type_: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; `shape` with the row length first."""
    values = 1
    for size in shape:
        values *= size
    return values // TYPES[type_].block * TYPES[type_].bytes
