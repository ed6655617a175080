"""LoRA projections that share one input, computed in few large matrix products."""
