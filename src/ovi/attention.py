"""Attention over heads, and the split of a width into them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention, scaled by 1/sqrt(d).

    Args:
        q: [B, H, Lq, d].
        k: [B, H, Lk, d].
        v: [B, H, Lk, d].
        mask: which keys may be attended, [B, Lk] bool; None for all.

    Returns:
        [B, H, Lq, d].
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None, :])


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, L, H*d] -> [B, H, L, d]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[B, H, L, d] -> [B, L, H*d]."""
    return x.transpose(1, 2).flatten(2)
