"""Agreement of two models' logits on the same rows."""
