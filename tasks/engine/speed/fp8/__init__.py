"""Frozen weights multiplied in 8-bit floats (e4m3) on cards that have them."""
