"""What attention has to know of a layer, and of the rows that lie one behind the other."""

from typing import NamedTuple

from torch import Tensor


class Attention(NamedTuple):
    """A layer's attention: numbers of heads, head dimension, the scores' scale, the norms' epsilon; `window` is how
    many tokens a token sees, itself among them (0: all), `local` chooses the table of angles."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    eps: float
    window: int
    local: bool


class Rows(NamedTuple):
    """Packed rows: `positions` (T,), `cu_seqlens` (rows + 1,) int32, the longest row's tokens, and by `Attention.local`
    the cosines and sines of positions, each (longest, D / 2)."""

    positions: Tensor
    cu_seqlens: Tensor
    longest: int
    tables: dict[bool, tuple[Tensor, Tensor]]
