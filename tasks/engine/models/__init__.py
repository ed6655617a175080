"""Models in memory: loading, adapters, the LM head, the text-only half, norms, number formats."""
