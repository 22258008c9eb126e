"""A summary of one stream modulates the other: the cheapest exchange there is."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovi.block import Block
from ovi.fusion.base import FUSIONS, Fusion
from ovi.stream import Control, Gate, Stream, apply_gate


class Summary(nn.Module):
    """One direction: the partner's mean token, normed, to a shift and a scale for every channel of one's own.

    Args:
        own: block that is modulated.
        partner: block whose stream is summed up.
        zero_init: let shift and scale start at zero.
    """

    def __init__(self, own: Block, partner: Block, *, zero_init: bool) -> None:
        super().__init__()
        self.eps = own.eps
        self.linear = nn.Linear(partner.dim, 2 * own.dim)
        nn.init.zeros_(self.linear.bias)
        if zero_init:
            nn.init.zeros_(self.linear.weight)
        else:
            nn.init.xavier_uniform_(self.linear.weight)

    def forward(self, own: Stream, partner: Stream, gate: Gate) -> Stream:
        """The stream with the partner's shift and scale added to those its feed-forward gets from the timestep."""
        # Normed after the mean: what a clip has in common is a small share of its tokens' size.
        mean = _mean(partner)
        shift_scale = apply_gate(self.linear(F.layer_norm(mean, mean.shape[-1:], eps=self.eps)), gate)
        # Rows of a block's modulation: shift, scale, gate of self-attention, then of the feed-forward.
        rows = F.pad(shift_scale.unflatten(-1, (2, -1)), (0, 0, 3, 1))
        return replace(own, modulation=own.modulation + rows.unsqueeze(1))


@FUSIONS.register("film")
class FiLMFusion(Fusion):
    """Each stream's feed-forward is shifted and scaled by a mean of the other: the cheap baseline (FiLM, 1709.07871).

    ``x += gate * FFN(N(x)(1 + s + s_y) + b + b_y)`` with ``(b_y, s_y) = W N(mean(y)) + c``, y the other stream after
    its text attention, its padding left out; s, b and gate are the block's own. Both directions read before either
    writes. One vector a sample crosses: it can tell what is heard or seen, never when. Its cost does not grow with the
    tokens but for the mean; a strategy that does no better than this has learnt nothing of time.

    ``4 Dv Da + 2 (Dv + Da)`` parameters a pair, as many weights as ``ovi`` has at equal widths.

    Args:
        video: the pair's video block.
        audio: the pair's audio block.
        zero_init: start as no exchange (W and c are 0).
    """

    def __init__(self, video: Block, audio: Block, *, zero_init: bool = True) -> None:
        super().__init__(video, audio)
        self.video = Summary(video, audio, zero_init=zero_init)
        self.audio = Summary(audio, video, zero_init=zero_init)

    def forward(self, v: Stream, a: Stream, video: Block, audio: Block, control: Control) -> tuple[Stream, Stream]:
        v = video.cross_attention(video.self_attention(v))
        a = audio.cross_attention(audio.self_attention(a))
        hears, sees = self.video(v, a, control.a2v), self.audio(a, v, control.v2a)
        # The next block gets the timestep's modulation again, not this one's.
        return v.with_tokens(video.feed_forward(hears).tokens), a.with_tokens(audio.feed_forward(sees).tokens)


def _mean(s: Stream) -> Tensor:
    """Mean over the real tokens, [B, D]."""
    if s.mask is None:
        return s.tokens.mean(1)
    weights = s.mask / s.mask.sum(1, keepdim=True).clamp(min=1)
    return torch.einsum("bl,bld->bd", weights.to(s.tokens.dtype), s.tokens)
