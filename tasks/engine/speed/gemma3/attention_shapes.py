"""Shapes and settings of a layer's attention, and the layout of packed rows."""

from typing import NamedTuple

from torch import Tensor


class AttentionShape(NamedTuple):
    """A layer's attention: head counts, head dimension, scale of the scores, epsilon of the query and key norms.

    `window` is how many tokens a token attends to, itself included (0: all); `is_local` chooses the rotary table.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    eps: float
    window: int
    is_local: bool


class PackedRows(NamedTuple):
    """Layout of packed rows: `positions` (T,) in their rows, `cu_seqlens` (rows + 1,) int32, tokens of the longest row.

    `rope_tables` are the cosines and sines of positions by `AttentionShape.is_local`, each (longest, D / 2).
    """

    positions: Tensor
    cu_seqlens: Tensor
    longest: int
    rope_tables: dict[bool, tuple[Tensor, Tensor]]
