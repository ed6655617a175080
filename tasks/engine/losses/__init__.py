"""Losses over a large vocabulary that never hold all logits (positions x vocabulary) at once.

Dimensions, in docstrings and as suffixes of tensors:

    N  labelled positions of a batch           H  width of the student         V  vocabulary of the student
    C  positions of one chunk (n in kernels)   G  width of the teacher         W  vocabulary of the teacher
    K  entries of a teacher's top k            B  K + 1 buckets with the tail  S  shared columns, min(V, W)

This package imports no torch: configs read `divergence_registry`.
"""
