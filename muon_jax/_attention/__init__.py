"""Attention: how its kernels hold heads, for QK-Clip and for ``heads=``.

structures               `MultiHead`, `GroupedQuery`, `MultiHeadLatent`: what a user declares
leaves, qk_norms         the kernels of the declared modules; norms that forbid QK-Clip
qk_clip                  weights multiplied by powers of gamma, head by head
split_heads, head_axes   kernels as one matrix for each head, or for groups of heads
"""
