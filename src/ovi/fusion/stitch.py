"""Experts stitched together: sound joins what the picture attends, then the picture what the sound attends."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovi.attention import split_heads
from ovi.block import Block, Guest
from ovi.errors import OviError
from ovi.fusion.base import FUSIONS, Fusion
from ovi.lean import normed_heads
from ovi.rope import Rotation, rotate
from ovi.stream import Control, Gate, Stream, apply_gate

SLACK_S = 1e-4
"""Far below a token, far above float32's rounding of times: a token on the edge of two frames is the later one's."""


class Keys(nn.Module):
    """Keys and values that tokens of a block's width add to one of its attentions.

    Args:
        block: whose attention it is.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.num_heads, self.eps = block.num_heads, block.eps
        self.k = nn.Linear(block.dim, block.dim)
        self.v = nn.Linear(block.dim, block.dim)
        self.norm_k = nn.RMSNorm(block.dim, eps=block.eps)
        for layer in (self.k, self.v):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def heads(self, k: Tensor, v: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Projected tokens to keys, normed and rotated, and values, [B, H, L, d] each."""
        return normed_heads(k, self.norm_k.weight, self.num_heads, self.eps, rotation), split_heads(v, self.num_heads)


class FrameKeys(Keys):
    """Sound in video's self-attention: a frame's tokens attend the audio tokens of its span of time.

    Args:
        block: the video block.
        zero_init: let the values start at zero.
    """

    def __init__(self, block: Block, *, zero_init: bool) -> None:
        super().__init__(block)
        if zero_init:
            nn.init.zeros_(self.v.weight)

    def guest(self, block: Block, v: Stream, a: Stream, heard: Tensor, gate: Gate) -> Guest:
        """The term for self-attention; ``heard`` are the audio tokens in video's width, [B, L, D]."""
        frames, index, real = v.grid[0], *tokens_of_frames(v, a)
        picked = index.flatten()
        # They stand where their frame stands, so that scores do not depend on when that is.
        rotation = v.rope[:: len(v.rope) // frames].repeat_interleave(index.shape[1], 0)
        k, values = self.heads(self.k(heard)[:, picked], self.v(heard)[:, picked], rotation)
        real = real[None] if a.mask is None else real & a.mask[:, index]
        some = real.any(-1, keepdim=True)

        def term(q: Tensor) -> Tensor:
            # Every frame is a sample of its own: the cost is linear in the length of the clip.
            q, keys, own = (x.unflatten(2, (frames, -1)).transpose(1, 2) for x in (q, k, values))
            shape = q.shape[:2]
            # A softmax over nothing is not a number: a frame without a token attends any, and what it gets is dropped.
            mask = (real | ~some).expand(*shape, -1)
            heads = block.attention(q.flatten(0, 1), keys.flatten(0, 1), own.flatten(0, 1), mask.flatten(0, 1))
            heads = torch.where(some[..., None, None], heads.unflatten(0, shape), 0)
            return apply_gate(heads.transpose(1, 2).flatten(2, 3), gate)

        return term


class PromptKeys(Keys):
    """The partner in text cross-attention: one softmax over the prompt's keys and the partner's.

    Args:
        block: whose cross-attention it is.
        zero_init: let the share of that softmax start at zero.
    """

    def __init__(self, block: Block, *, zero_init: bool) -> None:
        super().__init__(block)
        self.share = nn.Parameter(torch.zeros(block.num_heads) if zero_init else torch.ones(block.num_heads))

    def forward(
        self, block: Block, s: Stream, partner: Tensor, rotation: Rotation, mask: Tensor | None, gate: Gate
    ) -> Stream:
        """Cross-attention to the prompt and to ``partner`` [B, n, D], of which ``mask`` [B, n] bool is real."""
        assert s.exchange_rope is not None
        q, k, v = block.cross_qkv(s)
        text = block.attention(q, k, v, s.text.mask)
        k_added, v_added = self.heads(self.k(partner), self.v(partner), rotation)
        # Queries are turned for the partner, not for the prompt: both forms lie side by side, and a key is 0 where it
        # is not to meet one. Kernels divide by the root of the width, which is twice a head's, and want values as wide.
        width = q.shape[-1]
        k = torch.cat([F.pad(k, (0, width)), F.pad(k_added, (width, 0))], 2) * 2**0.5
        v = F.pad(torch.cat([v, v_added], 2), (0, width))
        scores = added_scores(s, partner, mask)
        both = block.attention(torch.cat([q, rotate(q, s.exchange_rope)], -1), k, v, scores)[..., :width]
        share = apply_gate(self.share.view(1, -1, 1, 1), gate)
        # Exactly ``text`` at 0 and ``both`` at 1; a longer softmax of which the end is masked is not, to the last bit.
        return block.cross_merge(s, torch.lerp(text, both, share.to(text.dtype)))


@FUSIONS.register("stitch")
class StitchFusion(Fusion):
    """Sound joins video's self- and text attention, the means of video's frames audio's (UniVerse-1, 2509.06155).

    In order, with N = LayerNorm and ``P(x) = W_2 silu(W_1 N(x))`` of the detached x::

        a = audio's self-attention
        h = P_a(a)                                   sound in video's width, [La, Dv]
        v = video's self-attention, its heads + a2v * softmax(q_f k_h^T) v_h over the tokens of each frame f
        s = P_v(v), the mean over each frame taken after N, [F, Da]
        v = video's text attention, its heads softmax(q [k_text, k_h]^T) [v_text, v_h]
        a = audio's text attention, its heads softmax(q [k_text, k_s]^T) [v_text, v_s]
        both feed-forwards

    Sequential, not symmetric: audio sees video that has heard it. Each of the three attentions has its own RMS-normed
    keys and its own values of the partner, and the block's queries and output projection. Text attention stands here
    as it is with ``zero_init=false`` and gates of 1; in general its heads are ``(1 - w) * (the softmax over the text) +
    w * (the one over both)``, w the gate times a learned number per head that starts at 0 or 1: no value that added
    keys have could leave a softmax as it was.

    - Frame by frame: a second softmax beside that of self-attention, as in the released code. There each frame has the
      same number of tokens; here those whose centre lies in its span of time. A frame without any hears nothing.
    - Rotation: in self-attention sound stands at its frame's time (published: keys unrotated). Beside the text, queries
      and the partner's keys are turned by ``model.rope_alignment``, means of frames at height and width 0 (published:
      each by its own index); the text's scores stay unrotated, as the towers know them.
    - Norms: published, what crosses passes through the video block's own norms and timestep; here one comes before its
      projection, so that a first frame given clean says nothing of how clean the sound is.
    - Gates: a2v rules both readings of video, v2a that of audio. As a number, 0 skips them.

    ``2 I (Dv + Da) + 2 I + 4 Dv^2 + 2 Da^2 + 9 Dv + 6 Da + Hv + Ha`` parameters a pair: H heads, I ``inner_dim``; at
    equal widths and the published I ``14 D^2 + 19 D + 2 H``, 3.5 times ``ovi``. Besides projections it costs the tokens
    of one frame per video token, and text attention a second time at twice the head width with La keys more.

    Args:
        video: the pair's video block.
        audio: the pair's audio block.
        inner_dim: hidden width I of the two projections; null the sum of both towers' widths, as published.
        detach: keep gradients from crossing, as published.
        zero_init: start as no exchange (values heard frame by frame are 0, and the share beside the text).

    Raises:
        OviError: for a hidden width below 1.
    """

    def __init__(
        self,
        video: Block,
        audio: Block,
        *,
        inner_dim: int | None = None,
        detach: bool = True,
        zero_init: bool = True,
    ) -> None:
        super().__init__(video, audio)
        if inner_dim is None:
            inner_dim = video.dim + audio.dim
        if inner_dim < 1:
            raise OviError(f"model.fusion.inner_dim={inner_dim}: expected at least 1, or null")
        self.detach = detach
        self.norm_audio = nn.LayerNorm(audio.dim, eps=audio.eps)
        self.norm_video = nn.LayerNorm(video.dim, eps=video.eps)
        self.to_video = projection(audio.dim, inner_dim, video.dim)
        self.to_audio = projection(video.dim, inner_dim, audio.dim)
        self.in_frame = FrameKeys(video, zero_init=zero_init)
        self.video = PromptKeys(video, zero_init=zero_init)
        self.audio = PromptKeys(audio, zero_init=zero_init)

    def forward(self, v: Stream, a: Stream, video: Block, audio: Block, control: Control) -> tuple[Stream, Stream]:
        a = audio.self_attention(a)
        heard = None if is_off(control.a2v) else self.to_video(self.norm_audio(self._given(a)))
        hears = None if heard is None else self.in_frame.guest(video, v, a, heard, control.a2v)
        v = video.self_attention(v, hears)
        seen = None if is_off(control.v2a) else self.to_audio(frame_means(self.norm_video(self._given(v)), v))
        if heard is None:
            v = video.cross_attention(v)
        else:
            assert v.partner_rope is not None
            v = self.video(video, v, heard, v.partner_rope, a.mask, control.a2v)
        if seen is None:
            a = audio.cross_attention(a)
        else:
            assert a.partner_rope is not None
            rotation = a.partner_rope[:: len(v.rope) // v.grid[0]]  # of the first token of every frame
            a = self.audio(audio, a, seen, rotation, None, control.v2a)
        return video.feed_forward(v), audio.feed_forward(a)

    def _given(self, s: Stream) -> Tensor:
        return s.tokens.detach() if self.detach else s.tokens


def projection(source: int, inner: int, target: int) -> nn.Sequential:
    """``W_2 silu(W_1 x)`` from one width to another."""
    layers = nn.Linear(source, inner), nn.Linear(inner, target)
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.SiLU(), layers[1])


def is_off(gate: Gate) -> bool:
    """Whether a gate is known to be 0 without looking at the device."""
    return not isinstance(gate, Tensor) and gate == 0


def frame_means(x: Tensor, v: Stream) -> Tensor:
    """Video tokens x [B, L, D] to the mean of every frame, [B, F, D]."""
    return x.unflatten(1, (v.grid[0], -1)).mean(2)


def tokens_of_frames(v: Stream, a: Stream) -> tuple[Tensor, Tensor]:
    """Audio tokens that sound during each frame: their numbers [F, n], and which of those do, [F, n] bool."""
    assert v.times is not None
    assert v.rate_hz is not None
    assert a.times is not None
    assert a.rate_hz is not None
    # Times are centres of spans; the first frame's begins at 0 and may be shorter.
    ends = torch.cat([2 * v.times[:1], v.times[1:] + 0.5 / v.rate_hz])
    until = (a.times < ends[:, None] - SLACK_S).sum(1)
    first = F.pad(until[:-1], (1, 0))
    most = min(len(a.times), math.ceil(a.rate_hz / v.rate_hz) + 1)
    index = first[:, None] + torch.arange(most, device=first.device)
    return index.clamp(max=len(a.times) - 1), index < until[:, None]


def added_scores(s: Stream, partner: Tensor, mask: Tensor | None) -> Tensor:
    """What is added to the scores of the prompt's and the partner's keys, [B, T + n] float.

    Zeros too are given: kernels that take no mask may not take heads of twice the width either.
    """
    text, more = (x.new_zeros(x.shape[:2], dtype=torch.float32) for x in (s.text.tokens, partner))
    text = text if s.text.mask is None else text + s.text.mask
    more = more if mask is None else more.masked_fill(~mask, -torch.inf)
    return torch.cat([text, more], 1)
