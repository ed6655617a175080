"""Losses over a large vocabulary that never hold all logits (positions x vocabulary) at once.

Suffixes of tensors name their dimensions:

    N  labelled positions (n, of one chunk)    H  width of the student         V  vocabulary of the student
    K  kept entries of a teacher's top k       G  width of the teacher         W  vocabulary of the teacher
    S  shared columns, min(V, W)

This package imports no torch: configs read `divergence_registry`.
"""
