"""One divergence a module: its formula, value and gradient, as its paper writes it."""
