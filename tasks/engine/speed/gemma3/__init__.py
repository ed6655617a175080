"""Gemma 3's decoder layers with hand-written gradients and kernels, for full training on one GPU."""

from tasks.engine.speed.gemma3.decoder import Gemma3Decoder

__all__ = ["Gemma3Decoder"]
