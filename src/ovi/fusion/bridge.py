"""A cross-attention of its own between the hidden states of the two towers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ovi.attention import join_heads, split_heads
from ovi.block import Block
from ovi.errors import OviError
from ovi.fusion.base import FUSIONS, Fusion
from ovi.lean import modulated_norm, normed_heads
from ovi.stream import Control, Gate, Stream, apply_gate

SITES = ("before", "after")
GATES = ("none", "scalar", "head", "partner_sigma")


class BridgeAttention(nn.Module):
    """One direction of a bridge: what one modality's tokens hear of the other's.

    Args:
        own: block that queries.
        partner: block whose stream is attended.
        inner_dim: width of queries, keys and values; a multiple of ``own``'s head width.
        adaln: AdaLN on both sides instead of raw queries and an affine norm on keys and values.
        gate: none, scalar, head or partner_sigma.
        zero_init: let the output projection start at zero.
    """

    def __init__(self, own: Block, partner: Block, *, inner_dim: int, adaln: bool, gate: str, zero_init: bool) -> None:
        super().__init__()
        self.adaln, self.gate, self.eps = adaln, gate, own.eps
        # Heads are as wide as the tower's own, because the tables of the shared clock are.
        self.num_heads = inner_dim * own.num_heads // own.dim
        self.q = nn.Linear(own.dim, inner_dim)
        self.k = nn.Linear(partner.dim, inner_dim)
        self.v = nn.Linear(partner.dim, inner_dim)
        self.o = nn.Linear(inner_dim, own.dim)
        self.norm_q = nn.RMSNorm(inner_dim, eps=own.eps)
        self.norm_k = nn.RMSNorm(inner_dim, eps=own.eps)
        for layer in (self.q, self.k, self.v, self.o):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        if zero_init:
            nn.init.zeros_(self.o.weight)
        if adaln:
            self.modulation_q = nn.Parameter(torch.randn(2, own.dim) / own.dim**0.5)
            self.modulation_kv = nn.Parameter(torch.randn(2, partner.dim) / partner.dim**0.5)
        else:
            self.norm_kv = nn.LayerNorm(partner.dim, eps=own.eps)
        # All gates start at (nearly) 1: with an output projection of zero a closed gate would never open.
        if gate == "head":
            self.head_gate = nn.Linear(own.dim, self.num_heads)
            nn.init.zeros_(self.head_gate.weight)
            nn.init.zeros_(self.head_gate.bias)
        elif gate != "none":
            self.gain = nn.Parameter(torch.ones(1 if gate == "scalar" else own.dim))
        self.partner_time: nn.Module = nn.Identity()
        if gate == "partner_sigma" and partner.dim != own.dim:
            self.partner_time = nn.Linear(partner.dim, own.dim, bias=False)  # the gain is its bias
            nn.init.xavier_uniform_(self.partner_time.weight)

    def forward(self, own: Stream, partner: Stream, block: Block, gate: Gate) -> Stream:
        """``x + gate * g * W_o softmax(rope(q) rope(k)) v``, the kernel being that of the querying ``block``."""
        assert own.exchange_rope is not None
        assert own.partner_rope is not None
        if self.adaln:
            x, y = _adaln(own, self.modulation_q, self.eps), _adaln(partner, self.modulation_kv, self.eps)
        else:
            x, y = own.tokens, self.norm_kv(partner.tokens)
        q = normed_heads(self.q(x), self.norm_q.weight, self.num_heads, self.eps, own.exchange_rope)
        k = normed_heads(self.k(y), self.norm_k.weight, self.num_heads, self.eps, own.partner_rope)
        heads = block.attention(q, k, split_heads(self.v(y), self.num_heads), partner.mask)
        if self.gate == "head":
            heads = heads * (2 * self.head_gate(x).sigmoid()).transpose(1, 2).unsqueeze(-1)
        term = apply_gate(self.o(join_heads(heads)), gate)
        if self.gate == "scalar":
            return own.with_tokens(torch.addcmul(own.tokens, term, self.gain))
        if self.gate == "partner_sigma":
            # The last segment is the one that is noised: a given first frame says nothing of how clean the rest is.
            strength = self.gain + self.partner_time(partner.time[:, -1:])
            return own.with_tokens(torch.addcmul(own.tokens, term, strength))
        return own.with_tokens(own.tokens + term)


@FUSIONS.register("bridge")
class BridgeFusion(Fusion):
    """Cross-attention of its own between the towers' hidden states, both directions reading before either writes.

    ``x += g * W_o softmax(rope(q) rope(k)) v`` with ``q = RMS(W_q x')``, ``k = RMS(W_k y')``, ``v = W_v y'``, for video
    (x video, y audio) and back, in heads of the querying tower's own width. Rotations are those of the shared clock;
    ``model.time_axis_only=true`` turns by time alone, as both published forms do.

    - ``adaln``: ``x' = N(x)(1 + s) + b`` and y' likewise, each with (b, s) = table + embedding of its *own* timestep, a
      table per side and direction. Without it x' = x and ``y' = LayerNorm(y)`` with affine.
    - ``gate``: g is 1 (none); one learned number (scalar); ``2 sigmoid(W x')`` per head and token, inside W_o (head);
      ``table + W_t time(partner)`` per channel (partner_sigma), W_t only where widths differ. Setting a channel of the
      table to minus the embedding of sigma 1 shuts a partner out that is pure noise, and no other.

    Parameters a pair, I_v and I_a being the widths of attention in the two directions: ``2 (I_v + I_a)(Dv + Da)``
    weights and ``5 (I_v + I_a) + Dv + Da`` biases and RMS scales; ``4 (Dv + Da)`` with AdaLN, else ``2 (Dv + Da)``;
    2 for a scalar gate, ``(D + 1) H`` a direction for one per head, ``Dv + Da`` for partner_sigma with another
    ``2 Dv Da`` where widths differ. So LTX-2's 4I(Dv+Da) + 5(Dv+Da) and MOVA's 2(Dv+Da)^2, and the small terms.

    Sources: LTX-2 (2601.03233), MOVA (2602.08794).

    Args:
        video: the pair's video block.
        audio: the pair's audio block.
        site: ``after`` self-attention and text cross-attention of both, or ``before`` the block.
        adaln: queries, keys and values from states modulated by their own timestep; false for raw queries and a
            LayerNorm on keys and values.
        gate: none, scalar, head or partner_sigma.
        inner_dim: width of attention in both directions, a multiple of both towers' head widths; null the smaller
            tower's width, rounded down to whole heads of the querying tower; ``own`` the querying tower's width.
        zero_init: start as no exchange (output projections are 0).

    Raises:
        OviError: for an unknown site or gate, or a width that does not split into heads.
    """

    def __init__(
        self,
        video: Block,
        audio: Block,
        *,
        site: Literal["before", "after"] = "after",
        adaln: bool = True,
        gate: Literal["none", "scalar", "head", "partner_sigma"] = "partner_sigma",
        inner_dim: int | Literal["own"] | None = None,
        zero_init: bool = True,
    ) -> None:
        super().__init__(video, audio)
        for knob, value, known in (("site", site, SITES), ("gate", gate, GATES)):
            if value not in known:
                raise OviError(f"model.fusion.{knob}={value}: expected {', '.join(known)}")
        self.site = site
        self.video, self.audio = (
            BridgeAttention(
                own,
                partner,
                inner_dim=_inner_dim(inner_dim, own, partner),
                adaln=adaln,
                gate=gate,
                zero_init=zero_init,
            )
            for own, partner in ((video, audio), (audio, video))
        )

    def forward(self, v: Stream, a: Stream, video: Block, audio: Block, control: Control) -> tuple[Stream, Stream]:
        if self.site == "after":
            v = video.cross_attention(video.self_attention(v))
            a = audio.cross_attention(audio.self_attention(a))
        v, a = self.video(v, a, video, control.a2v), self.audio(a, v, audio, control.v2a)
        return (video.feed_forward(v), audio.feed_forward(a)) if self.site == "after" else (video(v), audio(a))


@FUSIONS.register("bridge_ltx2")
class LTX2Fusion(BridgeFusion):
    """The bridge as LTX-2 has it (2601.03233): before the feed-forward, AdaLN, a gate from the partner's sigma.

    Ours differs where our towers do: LayerNorm for its RMS norm without affine; one time embedding under every table,
    where LTX-2 has a projection for each row, shared by all blocks; heads of the querying tower's width in both
    directions, where LTX-2 takes the audio tower's. Set ``model.time_axis_only=true`` with it.

    Args:
        video: the pair's video block.
        audio: the pair's audio block.
        zero_init: start as no exchange (output projections are 0).
    """

    def __init__(self, video: Block, audio: Block, *, zero_init: bool = True) -> None:
        super().__init__(
            video, audio, site="after", adaln=True, gate="partner_sigma", inner_dim=None, zero_init=zero_init
        )


@FUSIONS.register("bridge_mova")
class MOVAFusion(BridgeFusion):
    """The bridge as MOVA has it (2602.08794): before the block, raw queries, each direction at its own tower's width.

    Its scale of the exchange is the gate of ``Control``. Set ``model.time_axis_only=true`` and
    ``model/rope_alignment=ratio_audio`` with it; MOVA turns all dimensions of a head by time, ours the time share.

    Args:
        video: the pair's video block.
        audio: the pair's audio block.
        zero_init: start as no exchange (output projections are 0).
    """

    def __init__(self, video: Block, audio: Block, *, zero_init: bool = True) -> None:
        super().__init__(video, audio, site="before", adaln=False, gate="none", inner_dim="own", zero_init=zero_init)


def _adaln(s: Stream, table: Tensor, eps: float) -> Tensor:
    """The stream's tokens, normed, with shift and scale from ``table`` [2, D] and its own timesteps."""
    shift, scale = (table + s.time.unsqueeze(2)).unbind(2)
    return modulated_norm(s.tokens, shift, scale, s.segments, eps)


def _inner_dim(knob: int | str | None, own: Block, partner: Block) -> int:
    """The width of the attention by which ``own`` hears ``partner``."""
    width = own.dim // own.num_heads
    if knob == "own":
        return own.dim
    if knob is None:
        return max(width, min(own.dim, partner.dim) // width * width)
    if not isinstance(knob, int) or knob < 1 or knob % width:
        raise OviError(
            f"model.fusion.inner_dim={knob}: expected a multiple of both towers' head widths, "
            f"{width} and {partner.dim // partner.num_heads}, or own, or null"
        )
    return knob
