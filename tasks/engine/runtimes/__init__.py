"""llama.cpp and ggml: tensor types, quantizers, logits and server."""
