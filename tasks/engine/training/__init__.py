"""The training loop: its spec, callbacks, checkpoints, optimizer state, metrics, divergence diagnosis."""
