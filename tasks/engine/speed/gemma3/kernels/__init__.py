"""Operations between a layer's products as Triton kernels for CUDA, in float32 whatever the tensors' dtype.

Names, arguments and results are those of tasks.engine.speed.gemma3.reference_ops, which has the formulas. Programs of a
backward leave partial sums of the norm weights' gradients, which tasks.engine.speed.gemma3.norm_gradients reduces.
"""

from tasks.engine.speed.gemma3.kernels.attention import attend, attend_backward
from tasks.engine.speed.gemma3.kernels.geglu import gated_gelu, gated_gelu_backward
from tasks.engine.speed.gemma3.kernels.rms_norm import PROGRAMS, add_norm, add_norm_backward, norm
from tasks.engine.speed.gemma3.kernels.rotary import HEAD_PROGRAMS, norm_rotate, norm_rotate_backward

__all__ = [
    "HEAD_PROGRAMS", "PROGRAMS", "add_norm", "add_norm_backward", "attend", "attend_backward", "gated_gelu",
    "gated_gelu_backward", "norm", "norm_rotate", "norm_rotate_backward",
]  # fmt: skip
