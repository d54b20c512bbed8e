"""Fused kernels for GPUs, in Triton. Plain torch operations are the reference and the CPU's path.

`choice` says which of the two computes; `ops` are torch operations, with shapes for tracing and
gradients; `programs` are their Triton programs.
"""
