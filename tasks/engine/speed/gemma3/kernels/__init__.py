"""What a layer does between its products as Triton kernels for CUDA; float32 inside, whatever the tensors hold.

Names, arguments and results are those of tasks.engine.speed.gemma3.reference_ops, which has the formulas. Programs
of a backward leave
shares of the norm weights' gradients; whoever calls sums them, those of all layers at once.
"""

from tasks.engine.speed.gemma3.kernels.attention import attend, attend_backward
from tasks.engine.speed.gemma3.kernels.geglu import gated, gated_backward
from tasks.engine.speed.gemma3.kernels.rms_norm import PROGRAMS, add_norm, add_norm_backward, norm
from tasks.engine.speed.gemma3.kernels.rotary import HEAD_PROGRAMS, rotate, rotate_backward

__all__ = [
    "HEAD_PROGRAMS", "PROGRAMS", "add_norm", "add_norm_backward", "attend", "attend_backward", "gated",
    "gated_backward", "norm", "rotate", "rotate_backward",
]  # fmt: skip
