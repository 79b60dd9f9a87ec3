"""Kernels for one to four rows, where reading the weight is all there is: no tensor cores.

`x Wᵀ` over any base with its epilogue, and the shrink; what calls them is `ops.low_rank.steps` and
`ops.packed.steps`. docs/low_rank.md tells why.
"""
