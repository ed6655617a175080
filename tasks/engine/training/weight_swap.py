"""Weights that the loss sees in place of the trained ones (quantization-aware training)."""

from contextlib import AbstractContextManager
from typing import Protocol


class WeightSwap(Protocol):
    """Other weights in the model from a step's first forward to its last backward.

    The optimizer, validation's bookkeeping and checkpoints see the trained weights.
    """

    def swap_in(self, step: int) -> None:
        """Puts the other weights in place for the step that follows `step` finished ones."""

    def swap_out(self) -> None:
        """Puts the trained weights back."""

    def swapped_in(self, step: int) -> AbstractContextManager[None]:
        """`swap_in` and `swap_out` around a validation."""
