"""Weights that the loss sees in place of the trained ones, and when: a callback of transformers' Trainer."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

from transformers import TrainerCallback


class Shown(Protocol):
    """Weights that the loss sees in place of the trained ones, which the optimizer and checkpoints keep seeing."""

    def show(self, step: int) -> None:
        """Puts them in place for the step after `step` finished ones."""

    def restore(self) -> None:
        """Puts the trained weights back."""

    def during(self, step: int) -> AbstractContextManager[None]:
        """`show` and `restore` around a validation."""


class ShowWeights(TrainerCallback):
    """Other weights in place from a step's first forward to its last backward; the optimizer moves the trained ones."""

    def __init__(self, shown: Shown) -> None:
        self.shown = shown

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Before the step's first micro-batch."""
        self.shown.show(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """After its gradients."""
        self.shown.restore()
