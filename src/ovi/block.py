"""One transformer block of one modality, in phases that a fusion strategy orders."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ovi.attention import Attention, auto, join_heads, split_heads
from ovi.lean import gelu_linear, modulated_norm, normed_heads
from ovi.rope import Rotation
from ovi.stream import Stream, add_gated

Guest = Callable[[Tensor], Tensor]
"""A term that joins an attention's result: queries [B, H, L, d] -> [B, H, L, d]."""


class AttentionWeights(nn.Module):
    """Projections of one attention, with RMS-normed queries and keys over the whole width (spec: 'One twin block').

    Args:
        dim: width.
        num_heads: heads it is split into.
        eps: of the norms.
    """

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads, self.eps = num_heads, eps
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = nn.RMSNorm(dim, eps=eps)
        self.norm_k = nn.RMSNorm(dim, eps=eps)

    def queries(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        """[B, L, D] -> normed heads [B, H, L, d], rotated where a rotation is given."""
        return normed_heads(self.q(x), self.norm_q.weight, self.num_heads, self.eps, rotation)

    def keys(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        """[B, L, D] -> normed heads [B, H, L, d], rotated where a rotation is given."""
        return normed_heads(self.k(x), self.norm_k.weight, self.num_heads, self.eps, rotation)

    def values(self, x: Tensor) -> Tensor:
        """[B, L, D] -> heads [B, H, L, d]."""
        return split_heads(self.v(x), self.num_heads)

    def output(self, heads: Tensor) -> Tensor:
        """Heads [B, H, L, d] -> [B, L, D]."""
        return self.o(join_heads(heads))


class Block(nn.Module):
    """A DiT block: self-attention, cross-attention to the text, feed-forward, each a phase.

    Every phase maps a Stream to a Stream. Self-attention and feed-forward are modulated by the timestep (AdaLN with
    gate); cross-attention is not. An attention phase takes a guest: a term computed from its own queries and summed
    with its result before the one output projection.

    Args:
        dim: width D.
        num_heads: heads; dim / num_heads must be even.
        ffn_dim: hidden width of the feed-forward.
        eps: of all norms.
    """

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.dim, self.num_heads, self.eps = dim, num_heads, eps
        self.self_attn = AttentionWeights(dim, num_heads, eps)
        self.cross_attn = AttentionWeights(dim, num_heads, eps)
        self.norm3 = nn.LayerNorm(dim, eps=eps)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        self.attention: Attention = auto()

    def forward(self, s: Stream) -> Stream:
        """All phases, without a partner."""
        return self.feed_forward(self.cross_attention(self.self_attention(s)))

    def self_attention(self, s: Stream, guest: Guest | None = None) -> Stream:
        """``x + gate * W_o(softmax(rope(q) rope(k)) v + guest(q))`` on the modulated norm of x."""
        q, k, v = self.qkv(s)
        heads = self.attention(q, k, v, s.mask)
        if s.values_only is not None:
            heads = torch.where(s.values_only.view(-1, 1, 1, 1), v, heads)
        return self.merge(s, heads if guest is None else heads + guest(q))

    def cross_attention(self, s: Stream, guest: Guest | None = None) -> Stream:
        """``x + W_o(softmax(q k_text) v_text + guest(q))``; queries are not rotated here, a guest may rotate them."""
        q, k, v = self.cross_qkv(s)
        heads = self.attention(q, k, v, s.text.mask)
        return self.cross_merge(s, heads if guest is None else heads + guest(q))

    def feed_forward(self, s: Stream) -> Stream:
        """``x + gate * FFN(modulated norm of x)``."""
        shift, scale, gate = self._modulations(s, 3)
        hidden = self.ffn[0](modulated_norm(s.tokens, shift, scale, s.segments, self.eps))
        return s.with_tokens(add_gated(s.tokens, gelu_linear(hidden, self.ffn[2]), gate, s.segments))

    def qkv(self, s: Stream, rotation: Rotation | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Self-attention's rotated queries and keys, and values, [B, H, L, d] each, for strategies that join them.

        Args:
            s: the stream.
            rotation: another than the stream's own.
        """
        rotation = s.rope if rotation is None else rotation
        x = self.modulated(s)
        return self.self_attn.queries(x, rotation), self.self_attn.keys(x, rotation), self.self_attn.values(x)

    def modulated(self, s: Stream) -> Tensor:
        """Self-attention's input, the modulated norm of the tokens, [B, L, D]."""
        shift, scale, _ = self._modulations(s, 0)
        return modulated_norm(s.tokens, shift, scale, s.segments, self.eps)

    def merge(self, s: Stream, heads: Tensor) -> Stream:
        """Add self-attention's result [B, H, L, d] to the stream, through its output projection and gate."""
        _, _, gate = self._modulations(s, 0)
        return s.with_tokens(add_gated(s.tokens, self.self_attn.output(heads), gate, s.segments))

    def cross_qkv(self, s: Stream) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-attention's queries, unrotated, and the prompt's keys and values, for strategies that read more."""
        return self.cross_attn.queries(self.norm3(s.tokens)), *(s.text.keys or self.text_keys(s.text.tokens))

    def cross_merge(self, s: Stream, heads: Tensor) -> Stream:
        """Add cross-attention's result [B, H, L, d] to the stream, through its output projection."""
        return s.with_tokens(s.tokens + self.cross_attn.output(heads))

    def text_keys(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of text tokens [B, T, D], [B, H, T, d] each; they depend on the prompt alone."""
        return self.cross_attn.keys(tokens), self.cross_attn.values(tokens)

    def _modulations(self, s: Stream, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Shift, scale and gate [B, S, D] that start at row ``first`` of the block's table."""
        table = s.modulation[:, :, first : first + 3] + self.modulation[first : first + 3]
        shift, scale, gate = table.unbind(2)
        return shift, scale, gate
