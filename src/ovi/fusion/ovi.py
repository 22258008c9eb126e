"""The published fusion: a second softmax inside text cross-attention."""

from __future__ import annotations

from torch import Tensor, nn

from ovi.attention import split_heads
from ovi.block import Block, Guest
from ovi.fusion.base import FUSIONS, Fusion
from ovi.lean import normed_heads
from ovi.rope import rotate
from ovi.stream import Control, Gate, Stream, apply_gate


class PartnerAttention(nn.Module):
    """What one modality hears of the other: its own text queries, rotated, on the partner's keys and values.

    Args:
        own: block that queries.
        partner: block whose stream is attended.
    """

    def __init__(self, own: Block, partner: Block) -> None:
        super().__init__()
        self.num_heads, self.eps = own.num_heads, own.eps
        self.norm = nn.LayerNorm(partner.dim, eps=own.eps)
        self.k = nn.Linear(partner.dim, own.dim)
        self.v = nn.Linear(partner.dim, own.dim)
        self.norm_k = nn.RMSNorm(own.dim, eps=own.eps)
        for layer in (self.k, self.v):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def guest(self, block: Block, own: Stream, partner: Stream, gate: Gate) -> Guest:
        """The term for the querying ``block``'s cross-attention: ``gate * softmax(rope(q) rope(k_f)) v_f``."""
        assert own.exchange_rope is not None
        assert own.partner_rope is not None
        x = self.norm(partner.tokens)
        k = normed_heads(self.k(x), self.norm_k.weight, self.num_heads, self.eps, own.partner_rope)
        v = split_heads(self.v(x), self.num_heads)
        exchange_rope = own.exchange_rope

        def term(q: Tensor) -> Tensor:
            return apply_gate(block.attention(rotate(q, exchange_rope), k, v, partner.mask), gate)

        return term


@FUSIONS.register("ovi")
class OviFusion(Fusion):
    """Bidirectional cross-attention that shares queries and output projection with text attention (2510.01284, 3.2).

    ``x = x + W_o(softmax(q k_text) v_text + gate * softmax(rope(q) rope(k_f)) v_f)``, both directions reading the
    partner after self-attention and before either writes. ``4 D^2 + 10 D`` parameters a pair at equal widths.

    Args:
        video: the pair's video block.
        audio: the pair's audio block.
        zero_init: start with no exchange (values of the exchange are 0) instead of the published initialisation.
    """

    def __init__(self, video: Block, audio: Block, *, zero_init: bool = False) -> None:
        super().__init__(video, audio)
        self.video = PartnerAttention(video, audio)
        self.audio = PartnerAttention(audio, video)
        # The published initialisation is a tenth of Xavier's in the video tower only.
        for layer in (self.video.k, self.video.v):
            layer.weight.data.div_(10)
        if zero_init:
            nn.init.zeros_(self.video.v.weight)
            nn.init.zeros_(self.audio.v.weight)

    def forward(self, v: Stream, a: Stream, video: Block, audio: Block, control: Control) -> tuple[Stream, Stream]:
        v, a = video.self_attention(v), audio.self_attention(a)
        hears = self.video.guest(video, v, a, control.a2v)
        sees = self.audio.guest(audio, a, v, control.v2a)
        v, a = video.cross_attention(v, hears), audio.cross_attention(a, sees)
        return video.feed_forward(v), audio.feed_forward(a)
