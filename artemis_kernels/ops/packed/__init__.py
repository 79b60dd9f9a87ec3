"""Kernels over a packed weight: products by weight only and in 8 bits, with a low-rank epilogue.

Every product of a `QuantizedWeight` on a GPU, forward and dX, whichever operation calls it.
docs/quantization.md tells the whole story.
"""
