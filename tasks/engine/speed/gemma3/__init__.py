"""The layers of Gemma 3 written out for full training on a GPU: tasks.engine.speed.gemma3.decoder."""

from tasks.engine.speed.gemma3.decoder import Stack

__all__ = ["Stack"]
