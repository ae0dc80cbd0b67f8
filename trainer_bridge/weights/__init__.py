"""Pushes of weights: a trainer's tensors in, chunks over the wire, verified weights in shared memory out."""
