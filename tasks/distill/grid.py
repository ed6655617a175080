"""Quantization-aware distillation: from some step on the student is trained as its GGUF file will hold it.

The loss sees the weights rounded to the file's blocks, and its gradient moves the unrounded ones (the straight-through
estimator, arXiv 1308.3432). The last rounding is what is saved, so converting it to that file changes no weight.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tasks.core.errors import BadConfig
from tasks.distill import DistillConfig
from tasks.engine.runtimes.ggml_blocks import BLOCK, BlockKind, snap_

# llama.cpp decides by architecture which tensors it quantizes; of Gemma 3n it leaves many small ones alone.
KNOWN = ("gemma3_text",)


def block_kinds(model: PreTrainedModel, kind: BlockKind, embedding: BlockKind) -> dict[str, BlockKind]:
    """Which blocks each parameter gets in a GGUF file of `kind`: matrices `kind`, the tied embedding `embedding`.

    Norms are vectors, which a file keeps in float32. Raises BadConfig for models whose files look otherwise.
    """
    config = model.config.get_text_config()
    if config.model_type not in KNOWN or not config.tie_word_embeddings:
        raise BadConfig(
            f"grid={kind}: which blocks a GGUF file gives to the tensors is known for {', '.join(KNOWN)} with tied "
            f"embeddings, not for {config.model_type}: set grid=none"
        )
    table = model.get_input_embeddings().weight
    kinds = {
        name: embedding if parameter is table else kind
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2
    }
    for name in kinds:
        if (width := model.get_parameter(name).shape[1]) % BLOCK:
            raise BadConfig(f"grid={kind}: rows of {name} have {width} values, no multiple of {BLOCK}: set grid=none")
    return kinds


class Grid:
    """Weights on the grid from step `first` on; the trained ones wait aside, at the cost of one more copy of them."""

    def __init__(self, model: PreTrainedModel, config: DistillConfig, steps: int) -> None:
        assert config.grid != "none"
        kinds = block_kinds(model, config.grid, config.grid_embedding)
        self.weights = [(model.get_parameter(name).detach(), kind) for name, kind in kinds.items()]
        self.first = round(steps * (1 - config.grid_fraction))
        self._aside: list[Tensor] = []
        self._shown = False

    def show(self, step: int) -> None:
        """Puts the rounded weights in place, from step `first` on."""
        if step < self.first or self._shown:
            return
        if not self._aside:
            self._aside = [torch.empty_like(weight) for weight, _ in self.weights]
        for (weight, kind), aside in zip(self.weights, self._aside, strict=True):
            aside.copy_(weight)
            snap_(weight, kind)
        self._shown = True

    def restore(self) -> None:
        """Puts the trained weights back, bit for bit."""
        if self._shown:
            for (weight, _), aside in zip(self.weights, self._aside, strict=True):
                weight.copy_(aside)
        self._shown = False

    @contextmanager
    def during(self, step: int) -> Iterator[None]:
        """The weights of a validation after `step` steps."""
        self.show(step)
        try:
            yield
        finally:
            self.restore()


def settle(model: PreTrainedModel, config: DistillConfig) -> dict[str, BlockKind]:
    """Rounds the trained model for good; which blocks each parameter lies on."""
    assert config.grid != "none"
    kinds = block_kinds(model, config.grid, config.grid_embedding)
    for name, kind in kinds.items():
        snap_(model.get_parameter(name).detach(), kind)
    return kinds
