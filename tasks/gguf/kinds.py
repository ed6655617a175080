"""llama.cpp's file types ("kinds") as numbers; a test compares them with gguf-py's constants."""

from typing import NamedTuple


class FileType(NamedTuple):
    """A kind: `general.file_type`, and the type of tensors for which the mixture says nothing else."""

    id: int
    default: str


KINDS = {
    "F32": FileType(0, "F32"),
    "F16": FileType(1, "F16"),
    "BF16": FileType(32, "BF16"),
    "Q8_0": FileType(7, "Q8_0"),
    "Q6_K": FileType(18, "Q6_K"),
    "Q5_K_M": FileType(17, "Q5_K"),
    "Q5_K_S": FileType(16, "Q5_K"),
    "Q5_1": FileType(9, "Q5_1"),
    "Q5_0": FileType(8, "Q5_0"),
    "Q4_K_M": FileType(15, "Q4_K"),
    "Q4_K_S": FileType(14, "Q4_K"),
    "Q4_1": FileType(3, "Q4_1"),
    "Q4_0": FileType(2, "Q4_0"),
    "IQ4_NL": FileType(25, "IQ4_NL"),
    "IQ4_XS": FileType(30, "IQ4_XS"),
    "Q3_K_L": FileType(13, "Q3_K"),
    "Q3_K_M": FileType(12, "Q3_K"),
    "Q3_K_S": FileType(11, "Q3_K"),
    "IQ3_M": FileType(27, "IQ3_S"),
    "IQ3_S": FileType(26, "IQ3_S"),
    "IQ3_XS": FileType(22, "IQ3_S"),
    "IQ3_XXS": FileType(23, "IQ3_XXS"),
    "Q2_K": FileType(10, "Q2_K"),
    "Q2_K_S": FileType(21, "Q2_K"),
    "IQ2_M": FileType(29, "IQ2_S"),
    "IQ2_S": FileType(28, "IQ2_XS"),
    "IQ2_XS": FileType(20, "IQ2_XS"),
    "IQ2_XXS": FileType(19, "IQ2_XXS"),
    "IQ1_M": FileType(31, "IQ1_M"),
    "IQ1_S": FileType(24, "IQ1_S"),
}
NEED_IMATRIX = ("Q2_K_S", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
"""Kinds that llama.cpp refuses to make without an importance matrix, or that are garbage without one."""
IGNORE_IMATRIX = ("F32", "F16", "BF16", "Q8_0")
"""Types of tensors whose rounding ggml does not weigh."""
