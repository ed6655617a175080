"""The layers of Gemma 3 written out for full training on a GPU: tasks.engine.stack.gemma3."""

from tasks.engine.stack.gemma3 import Stack

__all__ = ["Stack"]
