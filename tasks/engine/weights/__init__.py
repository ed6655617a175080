"""Weights on disk: safetensors in and out, effective weights of base and adapter, NF4, rescaling."""
