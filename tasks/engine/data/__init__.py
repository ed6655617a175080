"""Rows to tensors: chat templates and labels, collation, sequence packing, prefetch, tokenizers."""
