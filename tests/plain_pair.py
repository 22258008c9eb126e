"""A pair of blocks with what flows through it, and its phases written out once more in the plainest way.

In float64, every token with its own modulation, every rotation a complex number, every attention a softmax over a
matrix of scores. Widths, head widths and token counts differ; video's first frame is given clean (two timesteps), two
of the audio tokens are padding. Nothing of ``ovi`` computes here: its modules only hold the weights. At the end, what
every additive strategy promises.
"""

from functools import partial
from types import SimpleNamespace

import torch

from ovi.block import Block
from ovi.clock import Clock
from ovi.fusion.none import NoFusion
from ovi.layout import LatentLayout
from ovi.patch import AudioPatch, VideoPatch
from ovi.rope import ROPE_ALIGNMENTS
from ovi.stream import Control, Prompt, Stream
from ovi.tower import Tower
from ovi.twin import build_twin

VIDEO, AUDIO = (48, 3), (24, 2)
"""Width and heads, so that heads are 16 and 12 wide."""


def pair(video=VIDEO, audio=AUDIO, *, seed=0, dtype=torch.float64):
    """Blocks ``video`` and ``audio``, streams ``v`` and ``a`` of two samples, and the angles of their rotations."""
    g = torch.Generator().manual_seed(seed)
    random = partial(torch.randn, generator=g, dtype=dtype)
    made = SimpleNamespace(angles={})
    grids, segments = {"v": (3, 2, 1), "a": (5,)}, {"v": (2, 4), "a": (5,)}
    lengths = {name: sum(parts) for name, parts in segments.items()}
    for name, other, (dim, heads) in (("v", "a", video), ("a", "v", audio)):
        block = Block(dim, heads, 2 * dim).to(dtype)
        randomise(block, seed)
        setattr(made, {"v": "video", "a": "audio"}[name], block)
        half = dim // heads // 2
        angles = {"own": random(lengths[name], half), "queries": random(lengths[name], half)}
        angles["partner"] = random(lengths[other], half)
        made.angles[name] = angles
        own, queries, partner = (torch.stack((x.cos(), x.sin()), -1) for x in angles.values())
        n = len(segments[name])
        stream = Stream(
            tokens=random(2, lengths[name], dim),
            segments=segments[name],
            modulation=random(2, n, 6, dim),
            time=random(2, n, dim),
            text=Prompt(random(2, 4, dim), random(2, 4)),
            grid=grids[name],
            rope=own,
            exchange_rope=queries,
            partner_rope=partner,
            mask=torch.tensor([[True] * 5, [True] * 3 + [False] * 2]) if name == "a" else None,
        )
        setattr(made, name, stream)
    return made


def randomise(module, seed=1):
    """All of a module's parameters, drawn anew."""
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.4)
    return module


def run(fusion, p, control=None):
    """The tokens that a fusion makes of a pair."""
    v, a = fusion(p.v, p.a, p.video, p.audio, control or Control())
    return v.tokens, a.tokens


def without_exchange(p):
    """The tokens that ``none`` makes of it, by our own code: what off must equal bit for bit."""
    return run(NoFusion(p.video, p.audio), p)


def gate_of(gate):
    """A gate, a number or one per sample, to multiply [B, ...] with."""
    return gate.double().view(-1, 1, 1) if isinstance(gate, torch.Tensor) else gate


def linear(layer, x):
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def norm(x, eps=1e-6):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def rms(layer, x, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * layer.weight


def split(x, heads):
    return torch.stack(x.chunk(heads, -1), 1)


def join(x):
    return torch.cat(list(x.unbind(1)), -1)


def turn(x, angles):
    """Dimensions 2i and 2i+1 of a head are one complex number, turned by the i-th angle."""
    turned = torch.complex(x[..., 0::2], x[..., 1::2]) * torch.exp(1j * angles)
    return torch.stack((turned.real, turned.imag), -1).flatten(-2)


def scores(q, k, mask=None):
    s = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is None:
        return s
    bias = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask
    return s + bias[:, None, None]


def attend(q, k, v, mask=None):
    return scores(q, k, mask).softmax(-1) @ v


def per_token(s, x):
    """One row a segment, [B, S, ...], to one a token."""
    return torch.cat([x[:, i : i + 1].expand(-1, n, *x.shape[2:]) for i, n in enumerate(s.segments)], 1)


def modulations(block, s):
    return per_token(s, s.modulation + block.modulation).unbind(2)


def self_attention(block, s, x, angles):
    m, w = modulations(block, s), block.self_attn
    y = norm(x) * (1 + m[1]) + m[0]
    q, k = (
        turn(split(rms(n, linear(layer, y)), w.num_heads), angles) for n, layer in ((w.norm_q, w.q), (w.norm_k, w.k))
    )
    heads = attend(q, k, split(linear(w.v, y), w.num_heads), s.mask)
    return x + m[2] * linear(w.o, join(heads))


def cross_attention(block, s, x):
    w, affine = block.cross_attn, block.norm3
    q = split(rms(w.norm_q, linear(w.q, norm(x) * affine.weight + affine.bias)), w.num_heads)
    k = split(rms(w.norm_k, linear(w.k, s.text.tokens)), w.num_heads)
    return x + linear(w.o, join(attend(q, k, split(linear(w.v, s.text.tokens), w.num_heads), s.text.mask)))


def feed_forward(block, s, x, shift=0, scale=0):
    """``shift`` and ``scale`` [B, 1, D] come on top of the timestep's."""
    m = modulations(block, s)
    hidden = linear(block.ffn[0], norm(x) * (1 + m[4] + scale) + m[3] + shift)
    gelu = hidden * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3))) / 2
    return x + m[5] * linear(block.ffn[2], gelu)


def attentions(p, v, a):
    """Self-attention, then text attention, of both."""
    v = cross_attention(p.video, p.v, self_attention(p.video, p.v, v, p.angles["v"]["own"]))
    return v, cross_attention(p.audio, p.a, self_attention(p.audio, p.a, a, p.angles["a"]["own"]))


def feed_forwards(p, v, a):
    return feed_forward(p.video, p.v, v), feed_forward(p.audio, p.a, a)


def close(got, expected):
    """Both tokens alike; audio's padding, which nothing reads, aside."""
    assert (got[0] - expected[0]).abs().max() < 1e-9
    real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    assert (got[1] - expected[1])[real].abs().max() < 1e-9


def starts_as_none(fusion, **knobs):
    """Zero-initialised it changes no bit of either stream; with ``zero_init=False`` it changes both."""
    p = pair(dtype=torch.float32)
    base = without_exchange(p)
    started = run(fusion(p.video, p.audio, **knobs), p)
    alive = run(fusion(p.video, p.audio, **knobs, zero_init=False), p)
    for s, b, other in zip(started, base, alive):
        assert torch.equal(s, b)
        assert not torch.equal(other, b)


def reads_before_writing(fusion, **knobs):
    """Within a pair, what one stream becomes does not know whether the other was written, bit for bit."""
    p = pair(dtype=torch.float32)
    live = fusion(p.video, p.audio, **knobs, zero_init=False)
    both, video_only, audio_only = (run(live, p, Control(*gates)) for gates in ((1, 1), (1, 0), (0, 1)))
    off = without_exchange(p)
    assert torch.equal(both[0], video_only[0])
    assert torch.equal(both[1], audio_only[1])
    assert torch.equal(video_only[1], off[1])
    assert torch.equal(audio_only[0], off[0])


def first_gradients(fusion, steps=2):
    """Names of a zero-initialised fusion's parameters that get a gradient, in each of the first steps."""
    p = pair()
    started = fusion(p.video, p.audio).double()
    optimizer = torch.optim.SGD(started.parameters(), lr=0.1)
    moved = []
    for _ in range(steps):
        optimizer.zero_grad()
        sum(tokens.square().mean() for tokens in run(started, p)).backward()
        moved.append({name for name, q in started.named_parameters() if q.grad is not None and q.grad.abs().max() > 0})
        optimizer.step()
    return moved


def fits_unequal_towers(fusion, **knobs):
    """In a whole model: off and at the start as without exchange, on in its own direction alone."""
    clock = Clock(fps=8, video_stride=1, causal_first_frame=False)

    def model(num_blocks, **also):
        torch.manual_seed(0)
        tower = partial(Tower, num_blocks=num_blocks, ffn_dim=32, freq_dim=16)
        built = build_twin(
            LatentLayout(4, 6, 8, 5, clock),
            video=partial(tower, patch=VideoPatch, dim=VIDEO[0], num_heads=VIDEO[1]),
            audio=partial(tower, patch=AudioPatch, dim=AUDIO[0], num_heads=AUDIO[1]),
            fusion=partial(fusion, **knobs, **also),
            rope_alignment=ROPE_ALIGNMENTS["seconds"],
        )
        for part in (built.video, built.audio):  # which would start at zero
            torch.nn.init.normal_(part.out.head.weight, std=0.3)
        return built

    text = [torch.randn(3, 8), torch.randn(5, 8)]
    call = torch.randn(2, 4, 4, 4, 4), torch.randn(2, 9, 6), torch.tensor([0.3, 0.8]), text, text
    started, live = model(2), model(1, zero_init=False)  # in one block there is no way back
    for a, b in zip(started(*call), started(*call, a2v=0.0, v2a=torch.zeros(2))):
        assert torch.equal(a, b)
    off, heard, seen = (live(*call, a2v=a2v, v2a=v2a) for a2v, v2a in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)))
    assert [torch.equal(x, y) for x, y in zip(heard, off)] == [False, True]
    assert [torch.equal(x, y) for x, y in zip(seen, off)] == [True, False]
