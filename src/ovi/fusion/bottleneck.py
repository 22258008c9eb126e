"""Exchange through a few learned tokens that attend both streams and are attended by both."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ovi.attention import Attention, join_heads, split_heads
from ovi.block import Block
from ovi.errors import OviError
from ovi.fusion.base import FUSIONS, Fusion
from ovi.lean import normed_heads
from ovi.stream import Control, Stream, apply_gate


class BottleneckSide(nn.Module):
    """One modality's door to the bottleneck: it is attended by the tokens, and attends them.

    Args:
        own: the modality's block.
        inner_dim: width of the tokens.
        num_heads: heads of both attentions.
        zero_init: let the output projection start at zero.
    """

    def __init__(self, own: Block, inner_dim: int, num_heads: int, *, zero_init: bool) -> None:
        super().__init__()
        self.num_heads, self.eps = num_heads, own.eps
        self.norm = nn.LayerNorm(own.dim, eps=own.eps)
        self.q = nn.Linear(own.dim, inner_dim)
        self.k = nn.Linear(own.dim, inner_dim)
        self.v = nn.Linear(own.dim, inner_dim)
        self.o = nn.Linear(inner_dim, own.dim)
        self.norm_q = nn.RMSNorm(inner_dim, eps=own.eps)
        self.norm_k = nn.RMSNorm(inner_dim, eps=own.eps)
        for layer in (self.q, self.k, self.v, self.o):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        if zero_init:
            nn.init.zeros_(self.o.weight)

    def summary(self, s: Stream, x: Tensor, queries: Tensor, attention: Attention) -> Tensor:
        """What the tokens read of the stream, whose norm is x: [B, n, I]."""
        k = normed_heads(self.k(x), self.norm_k.weight, self.num_heads, self.eps)
        # Under autocast the learned tokens stay float32, and attention kernels take one type.
        return join_heads(attention(queries.to(k.dtype), k, split_heads(self.v(x), self.num_heads), s.mask))

    def reading(self, x: Tensor, keys: Tensor, values: Tensor, attention: Attention) -> Tensor:
        """What the stream, whose norm is x, reads of the tokens: [B, L, D]."""
        q = normed_heads(self.q(x), self.norm_q.weight, self.num_heads, self.eps)
        return self.o(join_heads(attention(q, keys, values)))


@FUSIONS.register("bottleneck")
class BottleneckFusion(Fusion):
    """Exchange through a few learned tokens z that attend both streams and are attended by both (MBT, 2107.00135).

    After self-attention, with ``y = LayerNorm(x)``, for x video and audio alike, all weights but W_K, W_V per stream::

        z_x = z + softmax(RMS(z) RMS(W_k y)^T) W_v y                        the tokens read each stream
        z'  = (z_video + z_audio) / 2
        x  += gate * W_o softmax(RMS(W_q y) RMS(W_K z')^T) W_V z'           each stream reads the tokens

    As in MBT each stream updates the tokens by a softmax of its own and the mean of both goes back: in one softmax over
    both, the few tokens of sound would drown among those of the picture. MBT does both readings inside the streams'
    self-attention, with its projections; here they have projections of their own, at a width of their own, and the
    tokens have no feed-forward. MBT hands the tokens on from layer to layer; a fusion has no state beside the two
    streams, so here every pair has its own, and what they gathered goes on in the streams alone. That keeps the gates
    honest: a gate scales all that its stream reads of the tokens, and nothing of the partner comes round by the tokens
    of a later layer.

    The tokens have no position: they tell what, and when only as far as the streams' content does.

    ``4 I (Dv + Da) + 2 I^2 + 3 (Dv + Da) + (n + 14) I`` parameters a pair: n tokens of width I. Cost is linear in both
    lengths.

    Args:
        video: the pair's video block.
        audio: the pair's audio block.
        num_tokens: n; everything that crosses in a pair passes through this many vectors.
        inner_dim: width I, in heads of the narrower tower; null half that tower's heads, at least one.
        zero_init: start as no exchange (output projections are 0).

    Raises:
        OviError: without any token, or for a width that does not split into heads.
    """

    def __init__(
        self, video: Block, audio: Block, *, num_tokens: int = 4, inner_dim: int | None = None, zero_init: bool = True
    ) -> None:
        super().__init__(video, audio)
        narrow = min(video, audio, key=lambda block: block.dim)
        head_dim = narrow.dim // narrow.num_heads
        if inner_dim is None:
            inner_dim = max(1, narrow.num_heads // 2) * head_dim
        if inner_dim < 1 or inner_dim % head_dim:
            raise OviError(
                f"model.fusion.inner_dim={inner_dim}: expected a multiple of {head_dim}, "
                "the head width of the narrower tower, or null"
            )
        if num_tokens < 1:
            raise OviError(
                f"model.fusion.num_tokens={num_tokens}: expected at least 1; model/fusion=none has no exchange"
            )
        self.num_heads, self.eps = inner_dim // head_dim, narrow.eps
        self.tokens = nn.Parameter(torch.randn(num_tokens, inner_dim) * 0.02)
        self.norm_q = nn.RMSNorm(inner_dim, eps=self.eps)
        self.norm_k = nn.RMSNorm(inner_dim, eps=self.eps)
        self.k = nn.Linear(inner_dim, inner_dim)
        self.v = nn.Linear(inner_dim, inner_dim)
        for layer in (self.k, self.v):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.video = BottleneckSide(video, inner_dim, self.num_heads, zero_init=zero_init)
        self.audio = BottleneckSide(audio, inner_dim, self.num_heads, zero_init=zero_init)

    def forward(self, v: Stream, a: Stream, video: Block, audio: Block, control: Control) -> tuple[Stream, Stream]:
        v, a = video.self_attention(v), audio.self_attention(a)
        x_v, x_a = self.video.norm(v.tokens), self.audio.norm(a.tokens)
        z = self.tokens.to(x_v.dtype).expand(len(x_v), -1, -1)
        q = normed_heads(z, self.norm_q.weight, self.num_heads, self.eps)
        seen, heard = self.video.summary(v, x_v, q, video.attention), self.audio.summary(a, x_a, q, audio.attention)
        z = z + (seen + heard) / 2
        keys = normed_heads(self.k(z), self.norm_k.weight, self.num_heads, self.eps)
        values = split_heads(self.v(z), self.num_heads)
        hears = apply_gate(self.video.reading(x_v, keys, values, video.attention), control.a2v)
        sees = apply_gate(self.audio.reading(x_a, keys, values, audio.attention), control.v2a)
        v, a = v.with_tokens(v.tokens + hears), a.with_tokens(a.tokens + sees)
        return video.feed_forward(video.cross_attention(v)), audio.feed_forward(audio.cross_attention(a))
