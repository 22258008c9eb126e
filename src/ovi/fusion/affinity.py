"""One affinity matrix between both token sets, read in both directions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovi.attention import join_heads, split_heads
from ovi.block import Block
from ovi.errors import OviError
from ovi.fusion.base import FUSIONS, Fusion
from ovi.stream import Control, Stream, apply_gate


class AffinitySide(nn.Module):
    """One modality's share: its factor of the affinity, its values, and the way back into its width.

    Args:
        own: the modality's block.
        inner_dim: width of the factor and of the values.
        zero_init: let the gains start at zero.
    """

    def __init__(self, own: Block, inner_dim: int, *, zero_init: bool) -> None:
        super().__init__()
        self.eps = own.eps
        self.p = nn.Linear(own.dim, inner_dim)
        self.v = nn.Linear(own.dim, inner_dim)
        self.o = nn.Linear(inner_dim, own.dim)
        for layer in (self.p, self.v, self.o):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.gain = nn.Parameter(torch.zeros(own.dim) if zero_init else torch.ones(own.dim))

    def factor_and_values(self, s: Stream, num_heads: int) -> tuple[Tensor, Tensor]:
        """``P N(x)`` and ``V N(x)`` in heads, [B, H, L, d] each."""
        x = F.layer_norm(s.tokens, s.tokens.shape[-1:], eps=self.eps)
        return split_heads(self.p(x), num_heads), split_heads(self.v(x), num_heads)


@FUSIONS.register("affinity")
class AffinityFusion(Fusion):
    """One affinity matrix after the block: its rows feed video, its columns feed audio (JavisDiT, 2503.23377).

    ``S = P_v N(v) (P_a N(a))^T / sqrt(d)`` per head; ``v += g_v * O_v softmax_rows(S) V_a N(a)`` and
    ``a += g_a * O_a softmax_columns(S)^T V_v N(v)``, both from the state before either is written, g a gain per
    channel, N the norm without affine. Neither rotation nor timestep enters. S itself is never stored: the two factors
    exchange the roles of queries and keys between two calls of the attention kernel.

    ``3 I (Dv + Da) + 4 I + 2 (Dv + Da)`` parameters a pair, I being ``inner_dim``: weights, biases, and biases with
    gains; ``3 D^2 + 6 D`` at equal widths and the published I = D/2.

    Args:
        video: the pair's video block.
        audio: the pair's audio block.
        inner_dim: width I of the affinity, in heads of the narrower tower; null half that tower's heads, at least one.
        zero_init: start as no exchange (gains are 0, as published) rather than with gains of 1.

    Raises:
        OviError: for a width that does not split into heads.
    """

    def __init__(self, video: Block, audio: Block, *, inner_dim: int | None = None, zero_init: bool = True) -> None:
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
        self.num_heads = inner_dim // head_dim
        self.video = AffinitySide(video, inner_dim, zero_init=zero_init)
        self.audio = AffinitySide(audio, inner_dim, zero_init=zero_init)

    def forward(self, v: Stream, a: Stream, video: Block, audio: Block, control: Control) -> tuple[Stream, Stream]:
        v, a = video(v), audio(a)
        p_v, v_v = self.video.factor_and_values(v, self.num_heads)
        p_a, v_a = self.audio.factor_and_values(a, self.num_heads)
        hears = self.video.o(join_heads(video.attention(p_v, p_a, v_a, a.mask)))
        sees = self.audio.o(join_heads(audio.attention(p_a, p_v, v_v, v.mask)))
        return (
            v.with_tokens(torch.addcmul(v.tokens, apply_gate(hears, control.a2v), self.video.gain)),
            a.with_tokens(torch.addcmul(a.tokens, apply_gate(sees, control.v2a), self.audio.gain)),
        )
