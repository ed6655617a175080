"""Other runtimes: ggml's types and conversions, llama.cpp's logits and server."""
