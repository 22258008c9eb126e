"""One self-attention over the tokens of both towers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ovi.attention import split_heads
from ovi.block import Block
from ovi.errors import OviError
from ovi.fusion.base import FUSIONS, Fusion
from ovi.lean import normed_heads
from ovi.stream import Control, Gate, Stream, apply_gate

WEIGHTS = ("untied", "tied")


class PartnerKeys(nn.Module):
    """The partner's tokens as keys and values in the own tower's heads, for towers of unequal width or head count.

    Args:
        own: block whose queries meet them.
        partner: block whose self-attention input they are made of.
    """

    def __init__(self, own: Block, partner: Block) -> None:
        super().__init__()
        self.num_heads, self.eps = own.num_heads, own.eps
        self.k = nn.Linear(partner.dim, own.dim)
        self.v = nn.Linear(partner.dim, own.dim)
        self.norm_k = nn.RMSNorm(own.dim, eps=own.eps)
        for layer in (self.k, self.v):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, own: Stream) -> tuple[Tensor, Tensor]:
        """Self-attention input x [B, L, D_partner] to keys at ``own``'s clock and values, [B, H, L, d] each."""
        assert own.partner_rope is not None
        k = normed_heads(self.k(x), self.norm_k.weight, self.num_heads, self.eps, own.partner_rope)
        return k, split_heads(self.v(x), self.num_heads)


@FUSIONS.register("joint")
class JointFusion(Fusion):
    """One self-attention over both token sets; all else stays each tower's own (AVFullDiT 2512.02457, MM-DiT).

    ``x += c W_o softmax([q K^T / sqrt(d), q K_p^T / sqrt(d) + log gate]) [V; V_p]``, with q, K, V, W_o and the AdaLN
    gate c of the tower's own self-attention and K_p, V_p of its partner's; video and audio alike, both reading before
    either writes. Text cross-attention and feed-forward follow in each.

    - Towers of one width and head count: K_p and V_p are the partner's own, so every key is computed once and serves
      both directions. No parameters.
    - Otherwise ``K_p = RMS(W_k y)`` and ``V_p = W_v y`` in the own tower's heads, y being the partner's self-attention
      input (its modulated norm): ``4 Dv Da + 3 (Dv + Da)`` parameters a pair. Each tower keeps its own heads, so
      that off is still the tower alone.

    Rotations are those of self-attention, which therefore must have the exchange's positions
    (``model.self_alignment=null``); as video's queries meet both, ``model.time_axis_only`` cannot spare them the
    phases of height and width.

    A gate of 0 is the block alone: as a number bit for bit, in a tensor by scores of minus infinity. It is no factor
    but a share: the partner's tokens count as ``gate`` tokens each. Gates other than 1 and padding need a mask, which
    flash kernels do not take: ``attention=flex`` keeps their speed.

    ``weights=tied`` (JavisDiT++, 2602.19163) lets the audio block *use* the video block's self-attention, text
    attention and its norm, ``8 D^2 + 14 D`` parameters less a pair; feed-forward and AdaLN table stay apart. The state
    holds them under both names; of a checkpoint in which these differ, audio's are kept.

    Args:
        video: the pair's video block.
        audio: the pair's audio block; changed by ``tied``.
        weights: untied, or tied for towers of one width and head count.

    Raises:
        OviError: for unknown weights, or tied ones of unequal towers.
    """

    one_clock = True

    def __init__(self, video: Block, audio: Block, *, weights: Literal["untied", "tied"] = "untied") -> None:
        super().__init__(video, audio)
        if weights not in WEIGHTS:
            raise OviError(f"model.fusion.weights={weights}: expected {', '.join(WEIGHTS)}")
        sizes = [(block.dim, block.num_heads) for block in (video, audio)]
        self.equal = sizes[0] == sizes[1]
        if weights == "tied":
            if not self.equal:
                raise OviError(
                    "model.fusion.weights=tied needs towers of one width and head count, got video of dim {} with {} "
                    "heads and audio of dim {} with {}: set model.audio.dim and num_heads alike, or "
                    "model.fusion.weights=untied".format(*sizes[0], *sizes[1])
                )
            audio.self_attn, audio.cross_attn, audio.norm3 = video.self_attn, video.cross_attn, video.norm3
        if not self.equal:
            self.video, self.audio = PartnerKeys(video, audio), PartnerKeys(audio, video)

    def forward(self, v: Stream, a: Stream, video: Block, audio: Block, control: Control) -> tuple[Stream, Stream]:
        of_v, of_a = video.qkv(v), audio.qkv(a)
        hears, sees = (isinstance(gate, Tensor) or gate != 0.0 for gate in (control.a2v, control.v2a))
        for_v, for_a = of_v[1:], of_a[1:]
        if self.equal and (hears or sees):
            both = _joined(for_v, for_a)
            for_v, for_a = both if hears else for_v, both if sees else for_a
        elif not self.equal:
            for_v = _joined(for_v, self.video(audio.modulated(a), v)) if hears else for_v
            for_a = _joined(self.audio(video.modulated(v), a), for_a) if sees else for_a
        v, a = (
            _attended(video, v, of_v, for_v, _mask((v, 1.0), (a, control.a2v)) if hears else v.mask),
            _attended(audio, a, of_a, for_a, _mask((v, control.v2a), (a, 1.0)) if sees else a.mask),
        )
        v, a = video.cross_attention(v), audio.cross_attention(a)
        return video.feed_forward(v), audio.feed_forward(a)


Heads = tuple[Tensor, Tensor]
"""Keys and values, [B, H, L, d] each."""


def _joined(video: Heads, audio: Heads) -> Heads:
    return torch.cat((video[0], audio[0]), 2), torch.cat((video[1], audio[1]), 2)


def _attended(block: Block, s: Stream, own: tuple[Tensor, Tensor, Tensor], keys: Heads, mask: Tensor | None) -> Stream:
    """Self-attention with other keys and values than the stream's own, added to it."""
    heads = block.attention(own[0], *keys, mask)
    if s.values_only is not None:
        heads = torch.where(s.values_only.view(-1, 1, 1, 1), own[2], heads)
    return block.merge(s, heads)


def _mask(*streams: tuple[Stream, Gate]) -> Tensor | None:
    """What to add to the scores of all streams' tokens, [B, L_1 + L_2]: the log of what each counts; None for 0."""
    if all(s.mask is None and not isinstance(gate, Tensor) and gate == 1.0 for s, gate in streams):
        return None
    logs = []
    for s, gate in streams:
        share = torch.ones_like(s.tokens[..., 0], dtype=torch.promote_types(s.tokens.dtype, torch.float32))
        share = apply_gate(share if s.mask is None else share * s.mask, gate)
        # Not log(0), whose gradient times the 0 of the softmax would be NaN.
        logs.append(torch.where(share > 0, share, 1).log().masked_fill(share <= 0, -float("inf")))
    return torch.cat(logs, 1)
