"""llama.cpp's file types ("kinds"): the table from which config, form, docs/gguf.md, plans and proofs are derived.

    python -m tasks.gguf.kinds          # the table of docs/gguf.md

A kind whose mixture gives single tensors another type than `default` has these rules in tasks.gguf.tensor_types.
"""

from typing import NamedTuple

from tasks.engine.runtimes.ggml_types import TYPES


class FileType(NamedTuple):
    """A kind: its `general.file_type`, the type of its tensors, and the proof's default budget.

    The budget is (largest mean KL divergence in nats per token, smallest top-1 agreement): generous where the format is
    coarse, for models of a few million parameters lose more than large ones; the numbers are always reported.
    `needs_imatrix`: without an importance matrix llama.cpp refuses to make it, or it is garbage. `auto`: one of the
    kinds that `kind: auto` tries.
    """

    id: int
    default: str
    max_mean_kl: float
    min_top1: float
    needs_imatrix: bool = False
    auto: bool = False


KINDS = {
    "F32": FileType(0, "F32", 0.001, 0.99),
    "F16": FileType(1, "F16", 0.005, 0.98),
    "BF16": FileType(32, "BF16", 0.01, 0.98, auto=True),
    "Q8_0": FileType(7, "Q8_0", 0.02, 0.97, auto=True),
    "Q6_K": FileType(18, "Q6_K", 0.05, 0.95, auto=True),
    "Q5_K_M": FileType(17, "Q5_K", 0.15, 0.92, auto=True),
    "Q5_K_S": FileType(16, "Q5_K", 0.15, 0.92),
    "Q5_1": FileType(9, "Q5_1", 0.15, 0.92),
    "Q5_0": FileType(8, "Q5_0", 0.15, 0.92),
    "Q4_K_M": FileType(15, "Q4_K", 0.4, 0.85, auto=True),
    "Q4_K_S": FileType(14, "Q4_K", 0.4, 0.85, auto=True),
    "IQ4_NL": FileType(25, "IQ4_NL", 0.4, 0.85, auto=True),
    "IQ4_XS": FileType(30, "IQ4_XS", 0.4, 0.85, auto=True),
    "Q4_1": FileType(3, "Q4_1", 0.6, 0.80),
    "Q4_0": FileType(2, "Q4_0", 0.6, 0.80, auto=True),
    "Q3_K_L": FileType(13, "Q3_K", 1.0, 0.70),
    "Q3_K_M": FileType(12, "Q3_K", 1.0, 0.70, auto=True),
    "IQ3_M": FileType(27, "IQ3_S", 1.0, 0.70, auto=True),
    "Q3_K_S": FileType(11, "Q3_K", 1.0, 0.70, auto=True),
    "IQ3_S": FileType(26, "IQ3_S", 1.0, 0.70),
    "IQ3_XS": FileType(22, "IQ3_S", 1.0, 0.70),
    "IQ3_XXS": FileType(23, "IQ3_XXS", 1.0, 0.70, needs_imatrix=True, auto=True),
    "Q2_K": FileType(10, "Q2_K", 2.0, 0.50, auto=True),
    "Q2_K_S": FileType(21, "Q2_K", 2.0, 0.50, needs_imatrix=True),
    "IQ2_M": FileType(29, "IQ2_S", 2.0, 0.50, needs_imatrix=True, auto=True),
    "IQ2_S": FileType(28, "IQ2_XS", 2.0, 0.50, needs_imatrix=True),
    "IQ2_XS": FileType(20, "IQ2_XS", 2.0, 0.50, needs_imatrix=True, auto=True),
    "IQ2_XXS": FileType(19, "IQ2_XXS", 2.0, 0.50, needs_imatrix=True),
    "IQ1_M": FileType(31, "IQ1_M", 4.0, 0.30, needs_imatrix=True, auto=True),
    "IQ1_S": FileType(24, "IQ1_S", 4.0, 0.30, needs_imatrix=True),
}
"""By name, the best first: `auto` tries them in this order."""


def kinds_table() -> str:
    """The kinds in Markdown, for docs/gguf.md."""
    lines = ["| kind | bits a weight | proof: mean KL, top 1 | |", "|---|---|---|---|"]
    for name, kind in KINDS.items():
        bits = 8 * TYPES[kind.default].bytes / TYPES[kind.default].block
        notes = ["needs an imatrix"] * kind.needs_imatrix + ["tried by `auto`"] * kind.auto
        lines.append(f"| {name} | {bits:.4g} | {kind.max_mean_kl:g}, {kind.min_top1:.0%} | {', '.join(notes)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(kinds_table())
