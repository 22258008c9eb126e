"""Attention that is limited in time: frames hear the tokens around them, tokens see the frame at their own time."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovi.attention import join_heads, split_heads
from ovi.block import Block
from ovi.errors import OviError
from ovi.fusion.base import FUSIONS, Fusion
from ovi.lean import normed_heads
from ovi.stream import Control, Stream, apply_gate

INTERPOLATIONS = ("linear", "nearest")

SLACK_S = 2e-5
"""Above float32's rounding of a minute, far below a token: one that lies on the edge of two frames is the later's."""


class FrameAttention(nn.Module):
    """Projections of one direction, in heads of the querying tower.

    Args:
        own: block that queries.
        partner: block whose stream is attended.
        zero_init: let the output projection start at zero.
    """

    def __init__(self, own: Block, partner: Block, *, zero_init: bool) -> None:
        super().__init__()
        self.num_heads, self.eps = own.num_heads, own.eps
        self.norm_own = nn.LayerNorm(own.dim, eps=own.eps)
        self.norm_partner = nn.LayerNorm(partner.dim, eps=own.eps)
        self.q = nn.Linear(own.dim, own.dim)
        self.k = nn.Linear(partner.dim, own.dim)
        self.v = nn.Linear(partner.dim, own.dim)
        # Without a bias: who has nothing to attend to gets exactly nothing.
        self.o = nn.Linear(own.dim, own.dim, bias=False)
        self.norm_q = nn.RMSNorm(own.dim, eps=own.eps)
        self.norm_k = nn.RMSNorm(own.dim, eps=own.eps)
        for layer in (self.q, self.k, self.v):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.o.weight) if zero_init else nn.init.xavier_uniform_(self.o.weight)

    def hears(self, v: Stream, a: Stream, block: Block, window: int) -> tuple[Tensor, Tensor]:
        """What video tokens hear in the window around their frame, and their norm, [B, L_v, D_v] each."""
        num_frames = v.grid[0]
        edges = _edges(v)
        frames = torch.arange(num_frames, device=edges.device)
        starts, ends = edges[(frames - window).clamp(min=0)], edges[(frames + window + 1).clamp(max=num_frames)]
        index, heard = _tokens_between(a, starts, ends, _most(a, v, 2 * window + 1))
        heard = (heard if a.mask is None else heard & a.mask[:, index]).expand(len(a.tokens), -1, -1)
        y = self.norm_partner(a.tokens)
        k = normed_heads(self.k(y), self.norm_k.weight, self.num_heads, self.eps)[:, :, index]
        # A frame without sound attends to zeros: a softmax over no key at all would be NaN.
        values = split_heads(self.v(y), self.num_heads)[:, :, index] * heard[:, None, :, :, None]
        mask = heard | ~heard.any(-1, keepdim=True)
        k, values = (x.transpose(1, 2).flatten(0, 1) for x in (k, values))
        x = self.norm_own(v.tokens)
        by_frame = self.q(x).unflatten(1, (num_frames, -1)).flatten(0, 1)
        q = normed_heads(by_frame, self.norm_q.weight, self.num_heads, self.eps)
        heads = block.attention(q, k, values, mask.flatten(0, 1))
        return self.o(join_heads(heads).view_as(x)), x

    def sees(self, a: Stream, v: Stream, *, nearest: bool) -> Tensor:
        """What audio tokens see of the video frame interpolated at their own time, [B, L_a, D_a].

        No frame is interpolated, which would be one for each token: scores and results of both neighbours are. The
        norm of an interpolated key needs its length, ``|w k + w' k'|^2 = w^2 |k|^2 + w'^2 |k'|^2 + 2 w w' k k'``.
        """
        lists, frames, weights, places = _neighbours(a, v, nearest)
        w = weights.unsqueeze(-1)

        def between(x: Tensor) -> Tensor:
            """Lists [B, H, F, K, n] to interpolated rows [B, H, L, n]."""
            rows = x.flatten(2, 3)[:, :, places]
            return (rows * w).sum(2)

        y = self.norm_partner(v.tokens).unflatten(1, (v.grid[0], -1))
        k, values = self.k(y), self.v(y).unflatten(-1, (self.num_heads, -1))
        wide = torch.promote_types(k.dtype, torch.float32)
        lengths = (k * k).sum(-1, dtype=wide)[:, frames]
        products = F.pad((k[:, :-1] * k[:, 1:]).sum(-1, dtype=wide), (0, 0, 0, 1))[:, frames[0]]
        squares = (w**2 * lengths).sum(1) + 2 * w.prod(0) * products
        rms = (squares.clamp(min=0) / k.shape[-1] + self.eps).sqrt().unsqueeze(1)
        q = normed_heads(self.q(self.norm_own(a.tokens)), self.norm_q.weight, self.num_heads, self.eps)
        q = q * self.norm_k.weight.view(self.num_heads, 1, -1) / q.shape[-1] ** 0.5
        k = k.unflatten(-1, (self.num_heads, -1))
        scores = between(torch.einsum("bhfkd,bfphd->bhfkp", q[:, :, lists], k)) / rms
        shares = scores.softmax(-1).to(values.dtype)
        heads = between(torch.einsum("bhfkp,bfphd->bhfkd", shares[:, :, lists], values))
        return self.o(join_heads(heads).to(values.dtype))


@FUSIONS.register("framewise")
class FramewiseFusion(Fusion):
    """Cross-attention between neighbours in time alone, without rotation (UniAVGen 2511.03334, Wan2.2-S2V, Harmony).

    After self-attention and text cross-attention of both and before their feed-forwards, both directions reading
    before either writes, LN with affine, in heads of the querying tower:

    - a token of video frame i: ``v += W_o softmax(q K^T / sqrt(d)) V`` with ``q = RMS(W_q LN(v))``, ``K = RMS(W_k y)``,
      ``V = W_v y`` and y = LN of the audio tokens whose centres lie in the spans of frames ``i-window .. i+window``.
      Spans are true seconds, a causal first frame's shorter than the others: every audio token lies in one;
    - an audio token at time t: the same with y = the LN of the video frame interpolated at t, pixel by pixel, between
      the two whose centres enclose t; at the ends the one there is.

    Linear in the clip's length. A frame with no audio token in its window, and an audio token past the video's end,
    get nothing. ``2 (Dv + Da)^2`` weights, ``9 (Dv + Da)`` biases and norms a pair.

    ``mask_head`` scales what a video token hears by ``sigmoid(w LN(v) + b)``, one number a token, after UniAVGen's
    mask of where sound comes from, but with no loss of its own; ``Dv + 1`` parameters, starting at 1/2.

    Args:
        video: the pair's video block.
        audio: the pair's audio block.
        window: frames on either side that a frame hears besides its own.
        interpolation: linear, or nearest for the frame whose centre is closest.
        mask_head: learn which video tokens hear.
        zero_init: start as no exchange (output projections are 0).

    Raises:
        OviError: for a negative window or an unknown interpolation.
    """

    def __init__(
        self,
        video: Block,
        audio: Block,
        *,
        window: int = 1,
        interpolation: Literal["linear", "nearest"] = "linear",
        mask_head: bool = False,
        zero_init: bool = True,
    ) -> None:
        super().__init__(video, audio)
        if window < 0:
            raise OviError(f"model.fusion.window={window}: expected 0 (the frame itself) or more frames on either side")
        if interpolation not in INTERPOLATIONS:
            raise OviError(f"model.fusion.interpolation={interpolation}: expected {', '.join(INTERPOLATIONS)}")
        self.window, self.nearest = window, interpolation == "nearest"
        self.video = FrameAttention(video, audio, zero_init=zero_init)
        self.audio = FrameAttention(audio, video, zero_init=zero_init)
        self.mask_head = nn.Linear(video.dim, 1) if mask_head else None
        if self.mask_head is not None:
            nn.init.zeros_(self.mask_head.weight)
            nn.init.zeros_(self.mask_head.bias)

    def forward(self, v: Stream, a: Stream, video: Block, audio: Block, control: Control) -> tuple[Stream, Stream]:
        v, a = video.cross_attention(video.self_attention(v)), audio.cross_attention(audio.self_attention(a))
        heard, normed = self.video.hears(v, a, video, self.window)
        if self.mask_head is not None:
            heard = heard * self.mask_head(normed).sigmoid()
        seen = self.audio.sees(a, v, nearest=self.nearest)
        v = v.with_tokens(v.tokens + apply_gate(heard, control.a2v))
        a = a.with_tokens(a.tokens + apply_gate(seen, control.v2a))
        return video.feed_forward(v), audio.feed_forward(a)


class Neighbours(NamedTuple):
    """The latent frames before and after each audio token, the two whose centres enclose it.

    Args:
        lists: for each frame, the tokens whose neighbour it is, [F, K].
        frames: of each token, [2, L].
        weights: of these in the interpolation, [2, L]; they sum to 1, past the video's end to 0.
        places: of each token in the lists of these frames, laid end to end, [2, L].
    """

    lists: Tensor
    frames: Tensor
    weights: Tensor
    places: Tensor


def _neighbours(a: Stream, v: Stream, nearest: bool) -> Neighbours:
    assert a.times is not None
    assert v.times is not None
    edges, num_frames, most = _edges(v), v.grid[0], _most(a, v, 2)
    starts, ends = torch.cat((edges[:1], v.times[:-1])), torch.cat((v.times[1:], edges[-1:]))
    lists, _ = _tokens_between(a, starts, ends, most)
    before = torch.searchsorted(v.times, a.times, right=True) - 1
    frames = torch.stack((before.clamp(min=0), (before + 1).clamp(max=num_frames - 1)))
    centres = v.times[frames]
    after = ((a.times - centres[0]) / (centres[1] - centres[0]).clamp(min=SLACK_S)).clamp(0, 1)
    if nearest:
        after = (after + 0.5 + SLACK_S).floor()
    after = after * (frames[1] > frames[0])  # at the ends there is but one
    shown = (a.times >= edges[0]) & (a.times < edges[-1])
    places = frames * most + torch.arange(a.grid[0], device=edges.device) - lists[frames, 0]
    return Neighbours(lists, frames, torch.stack((1 - after, after)) * shown, places.clamp(0, num_frames * most - 1))


def _edges(v: Stream) -> Tensor:
    """Where the spans of latent frames meet, in seconds, [F + 1]: all but a causal first one are equally long."""
    assert v.times is not None
    assert v.rate_hz is not None
    half = 0.5 / v.rate_hz
    end = v.times[-1:] + (half if v.grid[0] > 1 else v.times)  # a first frame starts at 0, however long it is
    return torch.cat((v.times - half, end)) - SLACK_S


def _most(a: Stream, v: Stream, num_frames: int) -> int:
    """How many audio tokens at most lie in the spans of so many frames in a row."""
    assert a.rate_hz is not None
    assert v.rate_hz is not None
    return min(a.grid[0], math.ceil(num_frames * a.rate_hz / v.rate_hz) + 1)


def _tokens_between(a: Stream, starts: Tensor, ends: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` audio tokens from each start [N] on: their numbers, and which lie before the end, [N, count]."""
    assert a.times is not None
    index = torch.searchsorted(a.times, starts)[:, None] + torch.arange(count, device=starts.device)
    inside = index < a.times.shape[0]
    index = index.clamp(max=a.times.shape[0] - 1)
    return index, inside & (a.times[index] < ends[:, None])
