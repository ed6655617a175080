"""Losses over a large vocabulary that never hold (positions x vocabulary).

Shapes: N labelled positions, H student width, G teacher width, V student vocabulary, W teacher vocabulary.
"""

from tasks.engine.losses.chunked import cross_entropy, distillation
from tasks.engine.losses.loss_mix import Divergence, Head, Losses, Mix, TopK

__all__ = ["Divergence", "Head", "Losses", "Mix", "TopK", "cross_entropy", "distillation"]
