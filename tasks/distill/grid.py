"""Quantization-aware distillation: in its last steps the loss sees the weights as the GGUF file will store them.

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
from tasks.engine.models.family_registry import family_of, model_types
from tasks.engine.runtimes.ggml_blocks import BLOCK, BlockKind, snap_


def block_kinds(model: PreTrainedModel, kind: BlockKind, embedding: BlockKind) -> dict[str, BlockKind]:
    """The block format of each parameter in a GGUF file of `kind`: matrices `kind`, the tied embedding `embedding`.

    Norms are vectors, which a file stores in float32. Raises BadConfig for models whose files are not known.
    """
    config = model.config.get_text_config()
    if not family_of(config.model_type).gguf_quantizes_every_matrix or not config.tie_word_embeddings:
        supported = ", ".join(model_types("gguf_quantizes_every_matrix"))
        raise BadConfig(
            f"grid={kind}: which blocks a GGUF file gives to the tensors is known for {supported} with tied "
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


class GgufGrid:
    """Swaps in weights rounded to the grid, from step `first` on; the trained ones are a further copy meanwhile."""

    def __init__(self, model: PreTrainedModel, config: DistillConfig, steps: int) -> None:
        assert config.grid != "none"
        kinds = block_kinds(model, config.grid, config.grid_embedding)
        self.weights = [(model.get_parameter(name).detach(), kind) for name, kind in kinds.items()]
        self.first = round(steps * (1 - config.grid_fraction))
        self._trained: list[Tensor] = []
        self._swapped_in = False

    def swap_in(self, step: int) -> None:
        """Puts the rounded weights in place, from step `first` on."""
        if step < self.first or self._swapped_in:
            return
        if not self._trained:
            self._trained = [torch.empty_like(weight) for weight, _ in self.weights]
        for (weight, kind), trained in zip(self.weights, self._trained, strict=True):
            trained.copy_(weight)
            snap_(weight, kind)
        self._swapped_in = True

    def swap_out(self) -> None:
        """Puts the trained weights back, bit for bit."""
        if self._swapped_in:
            for (weight, _), trained in zip(self.weights, self._trained, strict=True):
                weight.copy_(trained)
        self._swapped_in = False

    @contextmanager
    def swapped_in(self, step: int) -> Iterator[None]:
        """The weights of a validation after `step` steps."""
        self.swap_in(step)
        try:
            yield
        finally:
            self.swap_out()


def round_to_grid(model: PreTrainedModel, config: DistillConfig) -> dict[str, BlockKind]:
    """Rounds the trained model's weights in place; returns the block format of each parameter."""
    assert config.grid != "none"
    kinds = block_kinds(model, config.grid, config.grid_embedding)
    for name, kind in kinds.items():
        snap_(model.get_parameter(name).detach(), kind)
    return kinds
