"""The kernels behind every low-rank operation: `S = x Fᵀ` (shrink), `y = x Wᵀ + s·S Bᵀ` (expand).

LoRA is the linear case (F = A, dropout on x); a bottleneck folded through its frozen linear layer
is the same two products with an activation on S between them (F = D W). docs/low_rank.md tells
the whole story.
"""
