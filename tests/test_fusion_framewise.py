"""Framewise attention against loops over frames and tokens whose times are exact fractions."""

from bisect import bisect_left, bisect_right
from dataclasses import replace
from fractions import Fraction
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from ovi.block import Block
from ovi.clock import Clock
from ovi.errors import OviError
from ovi.fusion import FramewiseFusion
from ovi.fusion.framewise import _edges, _most, _neighbours, _tokens_between
from ovi.layout import LatentLayout
from ovi.stream import Control
from plain_pair import (
    attend,
    attentions,
    feed_forwards,
    fits_unequal_towers,
    gate_of,
    join,
    linear,
    norm,
    pair,
    randomise,
    rms,
    run,
    split,
    without_exchange,
)
from small_twins import inputs, twin, woken

CAUSAL = Clock()  # 24 fps in fours after a single first one, 31.25 tokens a second
PLAIN = Clock(fps=12, video_stride=1, causal_first_frame=False)  # the edge of frames 23 and 24 is token 62's centre
SPARSE = Clock(fps=24, video_stride=1, causal_first_frame=False, audio_stride=1600)  # frames without any token
LONG_FRAMES = Clock(fps=25, video_stride=8, sample_rate=44100, audio_stride=1024)
CASES = {
    "causal": (CAUSAL, 31, 157),
    "plain": (PLAIN, 30, 78),
    "sparse": (SPARSE, 12, 5),
    "long frames": (LONG_FRAMES, 5, 56),
    "one frame": (CAUSAL, 1, 1),
    "two frames": (CAUSAL, 2, 6),
    "sound outlasts video": (CAUSAL, 4, 40),
    "video outlasts sound": (CAUSAL, 9, 11),
}
cases = pytest.mark.parametrize(("clock", "frames", "tokens"), CASES.values(), ids=CASES)


ON_THE_EDGE = Fraction(2, 100_000)
"""Seconds before a frame's start that float32 cannot tell from it."""


def spans(clock, frames):
    """When each latent frame begins and ends, in seconds, exactly."""
    first = 1 if clock.causal_first_frame else clock.video_stride
    ends = [first + i * clock.video_stride for i in range(frames)]
    return [(Fraction(a) / Fraction(clock.fps), Fraction(b) / Fraction(clock.fps)) for a, b in zip([0, *ends], ends)]


def centres_of_tokens(clock, tokens):
    return [Fraction((2 * j + 1) * clock.audio_stride, 2 * clock.sample_rate) for j in range(tokens)]


def in_window(clock, frames, tokens, window):
    """The tokens that each frame hears."""
    of, times = spans(clock, frames), centres_of_tokens(clock, tokens)
    bounds = [(of[max(i - window, 0)][0], of[min(i + window, frames - 1)][1]) for i in range(frames)]
    times = [t + ON_THE_EDGE for t in times]
    return [list(range(bisect_left(times, start), bisect_left(times, end))) for start, end in bounds]


def around(clock, frames, tokens, interpolation="linear"):
    """The frames that each token sees, with their weights."""
    of, seen = spans(clock, frames), []
    centres = [(a + b) / 2 for a, b in of]
    for t in centres_of_tokens(clock, tokens):
        if t + ON_THE_EDGE >= of[-1][1]:
            seen.append({})
        elif t <= centres[0] or t >= centres[-1]:
            seen.append({0 if t <= centres[0] else frames - 1: 1.0})
        else:
            i = bisect_right(centres, t) - 1
            far = (t - centres[i]) / (centres[i + 1] - centres[i])
            if interpolation == "nearest":
                far = Fraction(int(far >= Fraction(1, 2)))
            seen.append({n: float(w) for n, w in ((i, 1 - far), (i + 1, far)) if w})
    return seen


def timed(clock, frames, tokens, *, padded=True, dtype=torch.float64, size=(2, 3)):
    """A pair of other lengths: six pixels a frame, the first of them given; the second clip's sound ends early."""
    p = pair(dtype=dtype)
    g = torch.Generator().manual_seed(3)
    pixels = size[0] * size[1]
    lengths = {"v": frames * pixels, "a": tokens}
    for name, s in (("v", p.v), ("a", p.a)):
        length = lengths[name]
        angles = torch.randn(length, s.rope.shape[1], generator=g, dtype=dtype)
        p.angles[name]["own"] = angles
        times = clock.video_times_s(frames) if name == "v" else clock.audio_times_s(tokens)
        segments = (pixels, length - pixels) if name == "v" else (length,)
        setattr(
            p,
            name,
            replace(
                s,
                tokens=torch.randn(2, length, s.tokens.shape[-1], generator=g, dtype=dtype),
                segments=segments,
                grid=(frames, *size) if name == "v" else (tokens,),
                rope=torch.stack((angles.cos(), angles.sin()), -1),
                mask=torch.arange(tokens) < torch.tensor([[tokens], [(tokens + 1) // 2]])
                if name == "a" and padded
                else None,
                times=torch.tensor(times, dtype=dtype),
                rate_hz=clock.latent_fps if name == "v" else clock.tokens_per_s,
            ),
        )
    return p


def affine(layer, x):
    return norm(x) * layer.weight + layer.bias


def hears(p, side, v, a, window, clock):
    frames, heads = p.v.grid[0], side.num_heads
    y, x = affine(side.norm_partner, a), affine(side.norm_own, v)
    term = torch.zeros_like(v)
    per_frame = v.shape[1] // frames
    for b in range(2):
        for i, tokens in enumerate(in_window(clock, frames, a.shape[1], window)):
            heard = [j for j in tokens if p.a.mask is None or p.a.mask[b, j]]
            if not heard:
                continue
            rows = slice(i * per_frame, (i + 1) * per_frame)
            q = split(rms(side.norm_q, linear(side.q, x[b : b + 1, rows])), heads)
            k = split(rms(side.norm_k, linear(side.k, y[b : b + 1, heard])), heads)
            result = attend(q, k, split(linear(side.v, y[b : b + 1, heard]), heads))
            term[b, rows] = linear(side.o, join(result))[0]
    return term, x


def sees(p, side, v, a, interpolation, clock):
    heads, frames = side.num_heads, p.v.grid[0]
    y = affine(side.norm_partner, v).unflatten(1, (frames, -1))
    term = torch.zeros_like(a)
    for j, weights in enumerate(around(clock, frames, a.shape[1], interpolation)):
        if not weights:
            continue
        shown = sum(w * y[:, n] for n, w in weights.items())  # the interpolated frame itself
        q = split(rms(side.norm_q, linear(side.q, affine(side.norm_own, a[:, j : j + 1]))), heads)
        k = split(rms(side.norm_k, linear(side.k, shown)), heads)
        term[:, j] = linear(side.o, join(attend(q, k, split(linear(side.v, shown), heads))))[:, 0]
    return term


def expected(p, fusion, clock, control=None, window=1, interpolation="linear"):
    control = control or Control()
    v, a = attentions(p, p.v.tokens, p.a.tokens)
    heard, x = hears(p, fusion.video, v, a, window, clock)
    if fusion.mask_head is not None:
        heard = heard / (1 + torch.exp(-linear(fusion.mask_head, x)))
    seen = sees(p, fusion.audio, v, a, interpolation, clock)
    return feed_forwards(p, v + gate_of(control.a2v) * heard, a + gate_of(control.v2a) * seen)


def alike(got, wanted, tolerance=1e-9):
    assert all((x - y).abs().max() < tolerance for x, y in zip(got, wanted))


def framewise(p, **knobs):
    return randomise(FramewiseFusion(p.video, p.audio, **knobs).to(p.v.tokens.dtype))


@cases
@pytest.mark.parametrize(
    "knobs",
    [{}, {"window": 0}, {"window": 3, "interpolation": "nearest"}, {"mask_head": True}],
    ids=str,
)
@torch.no_grad()
def test_is_its_mathematics(clock, frames, tokens, knobs):
    p = timed(clock, frames, tokens)
    fusion = framewise(p, **knobs)
    given = {k: x for k, x in knobs.items() if k != "mask_head"}
    alike(run(fusion, p), expected(p, fusion, clock, **given))


@torch.no_grad()
def test_gates():
    p = timed(CAUSAL, 5, 20)
    fusion = framewise(p)
    for control in (Control(0.3, torch.tensor([0.0, 2.0])), Control(torch.tensor([0.5, 1.0]), 0.0)):
        alike(run(fusion, p, control), expected(p, fusion, CAUSAL, control))


CLOCKS = [
    Clock(fps, stride, causal, *audio)
    for fps in (8, 12, 24, 25, 30)
    for stride in (1, 4, 8)
    for causal in (True, False)
    for audio in ((16000, 512), (44100, 1024), (24000, 480), (16000, 1600))
]


@pytest.mark.parametrize("clock", CLOCKS, ids=str)
def test_lists_of_fixed_length_hold_everyone(clock):
    """Their length is known to the host: it must do for any clip, with the float32 times of a real model."""
    for frames in (1, 2, 3, 7, 31) + (361,) * (clock == CAUSAL):
        length = clock.lengths(clock.num_frames(frames))[1]
        for tokens in {max(length, 1), length + 9, max(length // 2, 1)}:
            p = timed(clock, frames, tokens, dtype=torch.float32, size=(1, 1))
            for window in (0, 1, 2):
                starts = _edges(p.v)[[max(i - window, 0) for i in range(frames)]]
                ends = _edges(p.v)[[min(i + window + 1, frames) for i in range(frames)]]
                index, inside = _tokens_between(p.a, starts, ends, _most(p.a, p.v, 2 * window + 1))
                wanted = in_window(clock, frames, tokens, window)
                assert [row[kept].tolist() for row, kept in zip(index, inside)] == wanted
            near = _neighbours(p.a, p.v, nearest=False)
            wanted = torch.zeros(tokens, frames)
            for j, weights in enumerate(around(clock, frames, tokens)):
                wanted[j, list(weights)] = torch.tensor(list(weights.values()))
            assert (
                torch.zeros(tokens, frames).scatter_add(1, near.frames.T, near.weights.T) - wanted
            ).abs().max() < 1e-4
            listed = near.lists.flatten()[near.places] == torch.arange(tokens)
            in_its_frame = near.places // near.lists.shape[1] == near.frames
            assert ((listed & in_its_frame) | (near.weights == 0)).all()


@torch.no_grad()
def test_every_token_belongs_to_one_frame():
    """Windows of no neighbours share the tokens out: none is lost, none is heard twice."""
    for clock in CLOCKS:
        frames = 24
        p = timed(clock, frames, clock.lengths(clock.num_frames(frames))[1], dtype=torch.float32, size=(1, 1))
        edges = _edges(p.v)
        index, inside = _tokens_between(p.a, edges[:-1], edges[1:], _most(p.a, p.v, 1))
        assert index[inside].tolist() == list(range(p.a.grid[0]))


def deaf(block):
    """Self-attention adds nothing: what one token knows, no other learns before the exchange."""
    torch.nn.init.zeros_(block.self_attn.o.weight)
    torch.nn.init.zeros_(block.self_attn.o.bias)


@pytest.mark.parametrize("window", [0, 1, 2])
@torch.no_grad()
def test_planted_sound_reaches_the_frames_around_it_and_no_other(window):
    p = timed(CAUSAL, 31, 157, padded=False, dtype=torch.float32, size=(1, 2))
    fusion = framewise(p, window=window)
    deaf(p.audio)
    before = run(fusion, p)[0].unflatten(1, (31, 2))
    heard_by = [{i for i, heard in enumerate(in_window(CAUSAL, 31, 157, window)) if j in heard} for j in range(157)]
    for j in (0, 1, 2, 40, 78, 120, 155, 156):
        tokens = p.a.tokens.clone()
        tokens[:, j] += 5
        q = timed(CAUSAL, 31, 157, padded=False, dtype=torch.float32, size=(1, 2))
        q.video, q.audio, q.a = p.video, p.audio, replace(p.a, tokens=tokens)
        after = run(fusion, q)[0].unflatten(1, (31, 2))
        changed = {i for i in range(31) if not torch.equal(before[:, i], after[:, i])}
        assert changed == heard_by[j]
        assert 1 <= len(changed) <= 2 * window + 1


@pytest.mark.parametrize("window", [0, 2])
def test_no_gradient_from_outside_the_window(window):
    p = timed(CAUSAL, 31, 157, padded=False, size=(1, 1))
    fusion = framewise(p, window=window)
    deaf(p.audio)
    p.a = replace(p.a, tokens=p.a.tokens.requires_grad_())
    video = run(fusion, p)[0]
    for i, heard in enumerate(in_window(CAUSAL, 31, 157, window)):
        (gradient,) = torch.autograd.grad(video[:, i].square().sum(), p.a.tokens, retain_graph=True)
        reached = gradient.abs().amax((0, 2)) > 0
        assert reached.nonzero().flatten().tolist() == heard


@pytest.mark.parametrize("interpolation", ["linear", "nearest"])
@torch.no_grad()
def test_planted_picture_reaches_the_tokens_beside_it_and_no_other(interpolation):
    p = timed(CAUSAL, 31, 157, padded=False, dtype=torch.float32, size=(1, 2))
    fusion = framewise(p, interpolation=interpolation)
    deaf(p.video)
    before = run(fusion, p)[1]
    seen = around(CAUSAL, 31, 157, interpolation)
    assert max(map(len, seen)) == (2 if interpolation == "linear" else 1)
    start = p.v.tokens
    for i in (0, 1, 2, 15, 29, 30):
        tokens = start.clone()
        tokens[:, 2 * i : 2 * i + 2] += 5
        p.v = replace(p.v, tokens=tokens)
        after = run(fusion, p)[1]
        changed = [j for j in range(157) if not torch.equal(before[:, j], after[:, j])]
        assert changed == [j for j, weights in enumerate(seen) if i in weights]


@torch.no_grad()
def test_a_frame_in_silence_hears_exactly_nothing():
    p = timed(SPARSE, 12, 5, padded=False, dtype=torch.float32)
    got, none = run(framewise(p, window=0), p)[0], without_exchange(p)[0]
    silent = [i for i, heard in enumerate(in_window(SPARSE, 12, 5, 0)) if not heard]
    assert len(silent) == 7
    for i in range(12):
        rows = slice(6 * i, 6 * i + 6)
        assert torch.equal(got[:, rows], none[:, rows]) == (i in silent)


def test_silence_leaves_no_nan_behind():
    p = timed(SPARSE, 12, 5)
    fusion = framewise(p, window=0)
    p.a.mask[1] = False  # a clip without sound
    video, audio = run(fusion, p)
    (video.square().sum() + audio.square().sum()).backward()
    for module in (fusion, p.video, p.audio):
        assert all(q.grad is None or q.grad.isfinite().all() for q in module.parameters())


@pytest.mark.parametrize("mask_head", [False, True])
@torch.no_grad()
def test_starts_as_none(mask_head):
    p = timed(CAUSAL, 5, 20, dtype=torch.float32)
    base = without_exchange(p)
    started = run(FramewiseFusion(p.video, p.audio, mask_head=mask_head), p)
    live = FramewiseFusion(p.video, p.audio, mask_head=mask_head, zero_init=False)
    off = run(live, p, Control(0.0, torch.zeros(2)))
    for b, s, o, x in zip(base, started, off, run(live, p)):
        assert torch.equal(s, b)
        assert torch.equal(o, b)
        assert not torch.equal(x, b)


@torch.no_grad()
def test_both_directions_read_before_either_writes():
    p = timed(CAUSAL, 5, 20, dtype=torch.float32)
    live, off = framewise(p), without_exchange(p)
    both, heard, seen = (run(live, p, Control(*gates)) for gates in ((1, 1), (1, 0), (0, 1)))
    assert torch.equal(both[0], heard[0])
    assert torch.equal(both[1], seen[1])
    assert torch.equal(heard[1], off[1])
    assert torch.equal(seen[0], off[0])


def test_starts_at_zero_and_does_not_stay_there():
    p = timed(CAUSAL, 5, 20)
    fusion = FramewiseFusion(p.video, p.audio, mask_head=True).double()
    optimizer = torch.optim.SGD(fusion.parameters(), lr=0.1)
    moved = []
    for _ in range(2):
        optimizer.zero_grad()
        sum(x.square().mean() for x in run(fusion, p)).backward()
        moved.append({n for n, q in fusion.named_parameters() if q.grad is not None and q.grad.abs().max() > 0})
        optimizer.step()
    assert moved[0] == {"video.o.weight", "audio.o.weight"}
    assert moved[1] == {name for name, _ in fusion.named_parameters()}


@pytest.mark.parametrize("sizes", [((48, 3), (24, 2)), ((3072, 24), (3072, 24)), ((4096, 32), (2048, 16))])
@pytest.mark.parametrize("mask_head", [False, True])
def test_parameters(sizes, mask_head):
    with torch.device("meta"):
        fusion = FramewiseFusion(*(Block(*size, 8) for size in sizes), mask_head=mask_head)
    total = sizes[0][0] + sizes[1][0]
    assert sum(p.numel() for p in fusion.parameters()) == 2 * total**2 + 9 * total + (sizes[0][0] + 1) * mask_head


@torch.no_grad()
def test_fits_unequal_towers():
    fits_unequal_towers(FramewiseFusion)
    fits_unequal_towers(partial(FramewiseFusion, window=0), interpolation="nearest", mask_head=True)


@cases
@torch.no_grad()
def test_a_model_hands_over_its_clock(clock, frames, tokens):
    """Times in float32 and rates, as the streams of a twin carry them."""
    model = twin("framewise", layout=LatentLayout(4, 6, 8, 5, clock), tower={"num_blocks": 1})
    fusion, caught = woken(model).fusions[0], []
    fusion.register_forward_hook(lambda module, args, result: caught.append((args, result)))
    video, audio, sigma, text, _ = inputs(frames=frames, tokens=tokens)
    model(video, audio, sigma, text, text)
    (v, a, *blocks, _), result = caught[0]
    p = SimpleNamespace(video=blocks[0], audio=blocks[1], v=v, a=a)
    p.angles = {who: {"own": torch.atan2(s.rope[..., 1], s.rope[..., 0])} for who, s in (("v", v), ("a", a))}
    alike([s.tokens for s in result], expected(p, fusion, clock), 2e-4)


@pytest.mark.slow
@torch.no_grad()
def test_one_compiled_fusion_serves_clips_of_every_rate():
    torch._dynamo.reset()
    p = timed(CAUSAL, 9, 42)
    fusion = framewise(p)
    compiled = torch.compile(fusion, backend="eager", fullgraph=True)
    for clock, frames, tokens in CASES.values():
        q = timed(clock, frames, tokens)
        q.video, q.audio = p.video, p.audio
        alike(run(compiled, q), run(fusion, q))
    torch._dynamo.reset()


@torch.no_grad()
def test_bfloat16_is_near_float32():
    p = timed(CAUSAL, 9, 42, dtype=torch.float32)
    fusion = framewise(p)
    with torch.autocast("cpu", torch.bfloat16):
        half = [x for x in (fusion.video.hears(p.v, p.a, p.video, 1)[0], fusion.audio.sees(p.a, p.v, nearest=False))]
    exact = fusion.video.hears(p.v, p.a, p.video, 1)[0], fusion.audio.sees(p.a, p.v, nearest=False)
    for a, b in zip(half, exact):
        assert a.dtype == torch.bfloat16
        assert (a - b).norm() < 0.03 * b.norm()


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"window": -1}, "model.fusion.window=-1: expected 0"),
        ({"interpolation": "cubic"}, "interpolation=cubic: expected linear, nearest"),
    ],
)
def test_wrong_knobs_are_named(knobs, says):
    with pytest.raises(OviError, match=says):
        FramewiseFusion(Block(48, 3, 8), Block(24, 2, 8), **knobs)
