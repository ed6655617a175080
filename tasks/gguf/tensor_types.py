"""The type of each tensor in a file of a kind: the rules of llama.cpp's quantizer (src/llama-quant.cpp), in its order.

The rules depend on a tensor's role, on its position among the tensors of this role, and on an importance matrix. Left
out, because nothing here makes them: experts of eight (Mixtral), Falcon, 70B, MXFP4 and ternary kinds.
"""

import re
from typing import NamedTuple

from tasks.engine.runtimes.ggml_types import FLOATS, fitting_type
from tasks.gguf.kinds import KINDS
from tasks.gguf.roles import EMBEDDINGS, dimensions, layer_order, quantizable, role

LOWEST = ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M")
LOW = (*LOWEST, "IQ2_S", "IQ2_M")


class KindOptions(NamedTuple):
    """What the rules read besides names and shapes: kind, overrides, importance matrix, and two numbers of the model.

    `overrides` are (regular expression searched in the name, type); the first that matches wins.
    """

    kind: str
    layers: int
    heads_per_kv: int
    imatrix: bool = False
    embedding_type: str | None = None
    output_type: str | None = None
    overrides: tuple[tuple[str, str], ...] = ()


class ChosenType(NamedTuple):
    """A tensor's type, and the type that the rules prefer regardless of the row length."""

    type: str
    preferred: str


def choose_types(
    options: KindOptions, shapes: dict[str, tuple[int, ...]], sources: dict[str, str]
) -> dict[str, ChosenType]:
    """Types by tensor name, from shapes with the row length first and the converter's types (`sources`)."""
    names = sorted(shapes, key=layer_order)
    counts = {"attn_v": sum(role(name) == "attn_v" for name in names)}
    tied = "output.weight" not in shapes
    counted: dict[str, int] = {}
    types = {}
    for name in names:
        if not quantizable(name, dimensions(shapes[name])):
            types[name] = ChosenType(sources[name], sources[name])
            continue
        preferred = _override(options, name, tied)
        if preferred is None and options.kind in FLOATS:
            preferred = sources[name]
        elif preferred is None:
            tensor_role = role(name)
            total = counts["attn_v"] if tensor_role == "attn_v" else options.layers
            preferred = _mixture_type(options, tensor_role, tied, counted.get(tensor_role, 0), total, shapes[name][0])
            counted[tensor_role] = counted.get(tensor_role, 0) + 1
        types[name] = ChosenType(fitting_type(preferred, shapes[name][0]), preferred)
    return types


def _override(options: KindOptions, name: str, tied: bool) -> str | None:
    """The type that the config sets for a tensor, or None."""
    if options.embedding_type and name in EMBEDDINGS:
        return options.embedding_type
    if options.output_type and name == "output.weight":
        return options.output_type
    for pattern, type_ in options.overrides:
        if re.search(pattern, name):
            return type_
    return options.output_type if tied and name in EMBEDDINGS else None


def _mixture_type(options: KindOptions, tensor_role: str, tied: bool, position: int, total: int, row: int) -> str:
    """The mixture's type for a tensor, number `position` of `total` with its role (llama_tensor_get_type_impl)."""
    default = KINDS[options.kind].default
    if tensor_role == "output" or (tied and tensor_role == "embedding"):
        return _output(options.kind, default, row)
    if tensor_role == "embedding":
        return _embedding(options.kind, default)
    if options.kind in LOW:
        return _low(options, default, tensor_role, position, total)
    use_more_bits = position < total // 8 or position >= 7 * total // 8 or (position - total // 8) % 3 == 2
    if tensor_role == "attn_v":
        return _attn_v(options, default, position, use_more_bits)
    if tensor_role == "ffn_down":
        return _ffn_down(options, default, position, total, use_more_bits)
    rules = {
        "attn_k": {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"},
        "attn_q": {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"},
        "attn_output": {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"},
    }
    if tensor_role in ("ffn_gate", "ffn_up"):
        return "IQ3_XXS" if options.kind == "IQ3_XS" and total // 8 <= position < 7 * total // 8 else default
    return rules.get(tensor_role, {}).get(options.kind, default)


def _output(kind: str, default: str, row: int) -> str:
    if fitting_type(default, row) != default:
        return "Q8_0"
    if kind in (*LOW, "IQ3_XXS"):
        return "Q5_K"
    return default if default == "Q8_0" else "Q6_K"


def _embedding(kind: str, default: str) -> str:
    if kind in LOWEST:
        return "Q2_K"
    return "IQ3_S" if kind in ("IQ2_S", "IQ2_M", "IQ3_XXS") else default


def _low(options: KindOptions, default: str, tensor_role: str, position: int, total: int) -> str:
    raised = "IQ3_S" if options.kind in ("IQ2_S", "IQ2_M") else "Q2_K"
    if tensor_role == "attn_v":
        return "Q4_K" if options.heads_per_kv >= 4 else raised
    if tensor_role == "ffn_down":
        return raised if position < total // 8 else default
    if tensor_role == "attn_output":
        changes = {"IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S"}
        return changes.get(options.kind, default)
    return default


def _attn_v(options: KindOptions, default: str, position: int, use_more_bits: bool) -> str:
    grouped = options.heads_per_kv >= 4
    match options.kind:
        case "Q2_K":
            return "Q4_K" if grouped else "Q3_K"
        case "IQ3_XXS":
            return "Q4_K" if grouped else "IQ3_XXS" if options.imatrix else "IQ3_S"
        case "Q2_K_S" | "IQ3_XS" | "IQ3_S" if grouped:
            return "Q4_K"
        case "IQ3_M":
            return "Q4_K"
        case "Q3_K_M":
            return "Q5_K" if position < 2 else "Q4_K"
        case "Q3_K_L":
            return "Q5_K"
        case "IQ4_NL" | "IQ4_XS" if grouped:
            return "Q5_K"
        case "Q4_K_M" | "Q5_K_M" if use_more_bits:
            return "Q6_K"
        case "Q4_K_S" if position < 4:
            return "Q5_K"
    return default


def _ffn_down(options: KindOptions, default: str, position: int, total: int, use_more_bits: bool) -> str:
    is_first = position < total // 8
    match options.kind:
        case "Q2_K":
            return "Q3_K"
        case "Q2_K_S" | "IQ3_M" if is_first:
            return "Q4_K"
        case "IQ3_XXS" if not options.imatrix:
            return "Q4_K" if is_first else "Q3_K"
        case "Q3_K_M":
            return "Q5_K" if position < total // 16 else "Q4_K"
        case "Q3_K_L":
            return "Q5_K"
        case "Q4_K_M" | "Q5_K_M" if use_more_bits:
            return "Q6_K"
        case "IQ4_NL" | "IQ4_XS" if is_first and not options.imatrix:
            return "Q5_K"
        case "Q4_K_S" if is_first:
            return "Q5_K"
        case "Q4_0" | "Q5_0" if is_first and options.imatrix:
            return "Q4_1" if options.kind == "Q4_0" else "Q5_1"
    return default
