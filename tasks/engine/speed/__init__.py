"""Optional accelerations: compilation, CUDA graphs, offload, packed attention, fused LoRA, FP8, Gemma 3 kernels."""
