"""Which type each tensor of a kind gets: the rules of llama.cpp's quantizer (src/llama-quant.cpp), in its order.

The rules look at a tensor's role, at how many of its role came before, and at whether there is an importance matrix.
Left out, because nothing here makes them: experts of eight (Mixtral), Falcon, 70B, MXFP4 and ternary kinds.
"""

import re
from typing import NamedTuple

from tasks.engine.runtimes.ggml_types import FLOATS, fitting
from tasks.gguf.kinds import KINDS
from tasks.gguf.roles import EMBEDDINGS, dimensions, layer_order, quantizable, role

LOWEST = ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M")
LOW = (*LOWEST, "IQ2_S", "IQ2_M")


class Wanted(NamedTuple):
    """What decides types beside the tensors: the kind, overrides, and the model's few numbers that the rules read.

    `overrides` are (regular expression searched in the name, type), the first that matches wins.
    """

    kind: str
    layers: int
    heads_per_kv: int
    imatrix: bool = False
    embedding_type: str | None = None
    output_type: str | None = None
    overrides: tuple[tuple[str, str], ...] = ()


class Chosen(NamedTuple):
    """A tensor's type; `asked` is what the rules wanted before the row length was looked at."""

    type: str
    asked: str


def choose(wanted: Wanted, tensors: dict[str, tuple[int, ...]], found: dict[str, str]) -> dict[str, Chosen]:
    """Types by name. `tensors` are shapes, row length first; `found` the types that the converter gave them."""
    names = sorted(tensors, key=layer_order)
    counts = {"attn_v": sum(role(name) == "attn_v" for name in names)}
    tied = "output.weight" not in tensors
    seen: dict[str, int] = {}
    chosen = {}
    for name in names:
        if not quantizable(name, dimensions(tensors[name])):
            chosen[name] = Chosen(found[name], found[name])
            continue
        asked = _named(wanted, name, tied)
        if asked is None and wanted.kind in FLOATS:
            asked = found[name]
        elif asked is None:
            kind = role(name)
            of = counts["attn_v"] if kind == "attn_v" else wanted.layers
            asked = _mixed(wanted, kind, tied, seen.get(kind, 0), of, tensors[name][0])
            seen[kind] = seen.get(kind, 0) + 1
        chosen[name] = Chosen(fitting(asked, tensors[name][0]), asked)
    return chosen


def _named(wanted: Wanted, name: str, tied: bool) -> str | None:
    """The type that the user asked for."""
    if wanted.embedding_type and name in EMBEDDINGS:
        return wanted.embedding_type
    if wanted.output_type and name == "output.weight":
        return wanted.output_type
    for pattern, type_ in wanted.overrides:
        if re.search(pattern, name):
            return type_
    return wanted.output_type if tied and name in EMBEDDINGS else None


def _mixed(wanted: Wanted, kind: str, tied: bool, i: int, n: int, row: int) -> str:
    """llama_tensor_get_type_impl: `i` tensors of this role came before, of `n`."""
    default = KINDS[wanted.kind].default
    if kind == "output" or (tied and kind == "embedding"):
        return _output(wanted.kind, default, row)
    if kind == "embedding":
        return _embedding(wanted.kind, default)
    if wanted.kind in LOW:
        return _low(wanted, default, kind, i, n)
    more_bits = i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2
    if kind == "attn_v":
        return _attn_v(wanted, default, i, more_bits)
    if kind == "ffn_down":
        return _ffn_down(wanted, default, i, n, more_bits)
    rules = {
        "attn_k": {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"},
        "attn_q": {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"},
        "attn_output": {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"},
    }
    if kind in ("ffn_gate", "ffn_up"):
        return "IQ3_XXS" if wanted.kind == "IQ3_XS" and n // 8 <= i < 7 * n // 8 else default
    return rules.get(kind, {}).get(wanted.kind, default)


def _output(kind: str, default: str, row: int) -> str:
    if fitting(default, row) != default:
        return "Q8_0"
    if kind in (*LOW, "IQ3_XXS"):
        return "Q5_K"
    return default if default == "Q8_0" else "Q6_K"


def _embedding(kind: str, default: str) -> str:
    if kind in LOWEST:
        return "Q2_K"
    return "IQ3_S" if kind in ("IQ2_S", "IQ2_M", "IQ3_XXS") else default


def _low(wanted: Wanted, default: str, kind: str, i: int, n: int) -> str:
    better = "IQ3_S" if wanted.kind in ("IQ2_S", "IQ2_M") else "Q2_K"
    if kind == "attn_v":
        return "Q4_K" if wanted.heads_per_kv >= 4 else better
    if kind == "ffn_down":
        return better if i < n // 8 else default
    if kind == "attn_output":
        changes = {"IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S"}
        return changes.get(wanted.kind, default)
    return default


def _attn_v(wanted: Wanted, default: str, i: int, more_bits: bool) -> str:
    many = wanted.heads_per_kv >= 4
    match wanted.kind:
        case "Q2_K":
            return "Q4_K" if many else "Q3_K"
        case "IQ3_XXS":
            return "Q4_K" if many else "IQ3_XXS" if wanted.imatrix else "IQ3_S"
        case "Q2_K_S" | "IQ3_XS" | "IQ3_S" if many:
            return "Q4_K"
        case "IQ3_M":
            return "Q4_K"
        case "Q3_K_M":
            return "Q5_K" if i < 2 else "Q4_K"
        case "Q3_K_L":
            return "Q5_K"
        case "IQ4_NL" | "IQ4_XS" if many:
            return "Q5_K"
        case "Q4_K_M" | "Q5_K_M" if more_bits:
            return "Q6_K"
        case "Q4_K_S" if i < 4:
            return "Q5_K"
    return default


def _ffn_down(wanted: Wanted, default: str, i: int, n: int, more_bits: bool) -> str:
    first = i < n // 8
    match wanted.kind:
        case "Q2_K":
            return "Q3_K"
        case "Q2_K_S" | "IQ3_M" if first:
            return "Q4_K"
        case "IQ3_XXS" if not wanted.imatrix:
            return "Q4_K" if first else "Q3_K"
        case "Q3_K_M":
            return "Q5_K" if i < n // 16 else "Q4_K"
        case "Q3_K_L":
            return "Q5_K"
        case "Q4_K_M" | "Q5_K_M" if more_bits:
            return "Q6_K"
        case "IQ4_NL" | "IQ4_XS" if first and not wanted.imatrix:
            return "Q5_K"
        case "Q4_K_S" if first:
            return "Q5_K"
        case "Q4_0" | "Q5_0" if first and wanted.imatrix:
            return "Q4_1" if wanted.kind == "Q4_0" else "Q5_1"
    return default
