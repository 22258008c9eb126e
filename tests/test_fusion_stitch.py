"""The stitched fusion against its mathematics written out frame by frame, and what its order and detachment mean."""

from dataclasses import replace
from fractions import Fraction
from functools import partial

import pytest
import torch

import plain_pair
from ovi.block import Block
from ovi.clock import Clock
from ovi.errors import OviError
from ovi.fusion import StitchFusion
from ovi.fusion.stitch import tokens_of_frames
from ovi.stream import Control
from plain_pair import (
    AUDIO,
    VIDEO,
    attend,
    close,
    feed_forwards,
    first_gradients,
    fits_unequal_towers,
    join,
    linear,
    modulations,
    norm,
    randomise,
    rms,
    run,
    scores,
    split,
    starts_as_none,
    turn,
    without_exchange,
)

SPANS = [[0], [1, 2], [3, 4]]
"""Audio tokens of the pair's three frames; in the second sample the last two are padding."""


def pair(*sizes, seed=0, dtype=torch.float64, made=plain_pair.pair):
    """The pair, with times: a first frame half as long as the others, eight tokens a second."""
    p = made(*sizes, seed=seed, dtype=dtype)
    p.v = replace(p.v, times=torch.tensor([0.0625, 0.25, 0.5]), rate_hz=4.0)
    p.a = replace(p.a, times=torch.arange(5) / 8 + 0.0625, rate_hz=8.0)
    return p


@pytest.fixture(autouse=True)
def pairs_have_times(monkeypatch):
    monkeypatch.setattr(plain_pair, "pair", pair)


def projected(layers, norm_layer, x):
    hidden = linear(layers[0], norm(x) * norm_layer.weight + norm_layer.bias)
    return linear(layers[2], hidden / (1 + torch.exp(-hidden)))


def hearing(p, fusion, x, heard, gate):
    """Video's self-attention, and beside it one softmax per sample, frame and head over the frame's real tokens."""
    block, s, angles, extra = p.video, p.v, p.angles["v"]["own"], fusion.in_frame
    m, w, heads = modulations(block, s), block.self_attn, block.num_heads
    y = norm(x) * (1 + m[1]) + m[0]
    q, k = (turn(split(rms(n, linear(layer, y)), heads), angles) for n, layer in ((w.norm_q, w.q), (w.norm_k, w.k)))
    result = attend(q, k, split(linear(w.v, y), heads), s.mask)
    k, v = split(rms(extra.norm_k, linear(extra.k, heard)), heads), split(linear(extra.v, heard), heads)
    own = torch.zeros_like(result)
    for b in range(2):
        for frame, span in enumerate(SPANS):
            real = [j for j in span if p.a.mask is None or p.a.mask[b, j]]
            rows = slice(2 * frame, 2 * frame + 2)
            if real:
                keys = turn(k[b][:, real], angles[2 * frame])
                own[b][:, rows] = attend(q[b][None, :, rows], keys[None], v[b][None, :, real])[0]
    gate = gate.view(-1, 1, 1, 1) if isinstance(gate, torch.Tensor) else gate
    return x + m[2] * linear(w.o, join(result + gate * own))


def beside_the_text(block, s, x, extra, partner, angles, mask, gate):
    """Text attention mixed with the softmax of all scores, of the text and of the partner, in one row."""
    w, heads = block.cross_attn, block.num_heads
    q = split(rms(w.norm_q, linear(w.q, norm(x) * block.norm3.weight + block.norm3.bias)), heads)
    k, v = split(rms(w.norm_k, linear(w.k, s.text.tokens)), heads), split(linear(w.v, s.text.tokens), heads)
    k_more = turn(split(rms(extra.norm_k, linear(extra.k, partner)), heads), angles["partner"])
    v_more = split(linear(extra.v, partner), heads)
    rows = scores(q, k, s.text.mask), scores(turn(q, angles["queries"]), k_more, mask)
    both = torch.cat(rows, -1).exp()
    both = both / both.sum(-1, keepdim=True) @ torch.cat([v, v_more], 2)
    share = extra.share.view(1, -1, 1, 1) * (gate.view(-1, 1, 1, 1) if isinstance(gate, torch.Tensor) else gate)
    return x + linear(w.o, join((1 - share) * attend(q, k, v, s.text.mask) + share * both))


def expected(p, fusion, control):
    a = plain_pair.self_attention(p.audio, p.a, p.a.tokens, p.angles["a"]["own"])
    heard = projected(fusion.to_video, fusion.norm_audio, a)
    v = hearing(p, fusion, p.v.tokens, heard, control.a2v)
    n = fusion.norm_video
    means = torch.stack([(norm(v) * n.weight + n.bias)[:, i : i + 2].sum(1) / 2 for i in (0, 2, 4)], 1)
    seen = linear(fusion.to_audio[2], torch.nn.functional.silu(linear(fusion.to_audio[0], means)))
    of_frames = {**p.angles["a"], "partner": p.angles["a"]["partner"][[0, 2, 4]]}
    return feed_forwards(
        p,
        beside_the_text(p.video, p.v, v, fusion.video, heard, p.angles["v"], p.a.mask, control.a2v),
        beside_the_text(p.audio, p.a, a, fusion.audio, seen, of_frames, None, control.v2a),
    )


CONTROLS = (
    Control(),
    Control(0.3, torch.tensor([0.0, 2.0])),
    Control(torch.tensor([0.5, 1.0]), 0.0),
    Control(0.0, 1.0),
)


@pytest.mark.parametrize("inner_dim", [None, 10])
@torch.no_grad()
def test_is_its_mathematics(inner_dim):
    p = pair()
    fusion = randomise(StitchFusion(p.video, p.audio, inner_dim=inner_dim).double())
    for control in CONTROLS:
        close(run(fusion, p, control), expected(p, fusion, control))


@torch.no_grad()
def test_the_audio_tower_may_be_the_wider_one_and_masks_may_be_absent():
    p = pair(AUDIO, VIDEO)
    p.v = replace(p.v, text=replace(p.v.text, mask=None))
    p.a = replace(p.a, mask=None)
    fusion = randomise(StitchFusion(p.video, p.audio).double())
    close(run(fusion, p), expected(p, fusion, Control()))


@torch.no_grad()
def test_without_zero_init_text_attention_is_one_softmax():
    """As published: with a share of 1 the softmax over the text alone has no part in the result."""
    p = pair()
    fusion = StitchFusion(p.video, p.audio, zero_init=False).double()
    p.v = replace(p.v, text=replace(p.v.text, mask=torch.full((2, 4), -1e9, dtype=torch.float64)))
    p.a = replace(p.a, mask=None)
    before = run(fusion, p)[0]
    p.v = replace(p.v, text=replace(p.v.text, tokens=p.v.text.tokens * 3 + 1))
    assert torch.equal(run(fusion, p)[0], before)


def test_parameters():
    for (v, heads_v), (a, heads_a), knob in (
        (VIDEO, AUDIO, None),
        (VIDEO, AUDIO, 7),
        ((3072, 24), (3072, 24), None),
        ((4096, 32), (2048, 16), 2048),
    ):
        with torch.device("meta"):
            fusion = StitchFusion(Block(v, heads_v, 8), Block(a, heads_a, 8), inner_dim=knob)
        i = v + a if knob is None else knob
        count = sum(p.numel() for p in fusion.parameters())
        assert count == 2 * i * (v + a) + 2 * i + 4 * v**2 + 2 * a**2 + 9 * v + 6 * a + heads_v + heads_a
        if knob is None and v == a:
            assert count == 14 * v**2 + 19 * v + 2 * heads_v


@pytest.mark.parametrize(
    ("clock", "num_frames"),
    [(Clock(), 121), (Clock(), 5), (Clock(), 1), (Clock(fps=8, video_stride=1, causal_first_frame=False), 12),
     (Clock(fps=25, sample_rate=16000, audio_stride=640), 49), (Clock(fps=60, video_stride=1), 10),
     (Clock(fps=25, video_stride=1, audio_stride=1280), 80)],  # every centre of a token on an edge
)  # fmt: skip
def test_every_token_sounds_during_one_frame(clock, num_frames):
    """Spans in exact fractions of seconds; a token on an edge is the later frame's, one after the end is no frame's."""
    frames, tokens = clock.lengths(num_frames)
    tokens += 3  # sound may outlast the picture
    p = pair()
    v = replace(p.v, times=torch.tensor(clock.video_times_s(frames)), rate_hz=clock.latent_fps)
    a = replace(p.a, times=torch.tensor(clock.audio_times_s(tokens)), rate_hz=clock.tokens_per_s)
    index, real = tokens_of_frames(v, a)
    ends = [Fraction(clock.num_frames(i + 1)) / Fraction(clock.fps) for i in range(frames)]
    times = [(j + Fraction(1, 2)) * clock.audio_stride / clock.sample_rate for j in range(tokens)]
    for frame, end in enumerate(ends):
        begin = ends[frame - 1] if frame else 0
        assert index[frame][real[frame]].tolist() == [j for j, t in enumerate(times) if begin <= t < end]
    assert index.shape[1] <= -(-clock.tokens_per_s // clock.latent_fps) + 1


@torch.no_grad()
def test_a_frame_hears_its_own_tokens_alone_in_self_attention():
    """A planted change of one token; beside the text the whole clip is heard, so that reading is shut (share 0)."""
    p = pair(dtype=torch.float32)
    fusion = randomise(StitchFusion(p.video, p.audio))
    fusion.video.share.zero_()
    # No way from one audio token or one video token to another.
    p.audio.self_attn.o.weight.zero_()
    p.video.self_attn.v.weight.zero_()
    p.a = replace(p.a, mask=None)
    before = run(fusion, p)[0]
    for token, frame in ((0, 0), (1, 1), (2, 1), (3, 2), (4, 2)):
        changed = p.a.tokens.clone()
        changed[:, token] += 1
        p.a, kept = replace(p.a, tokens=changed), p.a
        same = (run(fusion, p)[0] == before).flatten(2).all(2).all(0).view(3, 2)
        p.a = kept
        assert [bool(s.all()) for s in same] == [i != frame for i in range(3)]
        assert not same[frame].any()


@torch.no_grad()
def test_what_a_frame_hears_does_not_depend_on_when_it_is():
    """Moving the whole picture along the axis of rotation changes nothing of what frames hear."""
    p = pair()
    p.video.self_attn.v.weight.zero_()
    p.video.self_attn.v.bias.zero_()
    fusion = randomise(StitchFusion(p.video, p.audio).double())
    before = run(fusion, p)[0]
    angles = p.angles["v"]["own"] + torch.linspace(0.1, 3, 8, dtype=torch.float64)
    p.v = replace(p.v, rope=torch.stack((angles.cos(), angles.sin()), -1))
    assert (run(fusion, p)[0] - before).abs().max() < 1e-12


@torch.no_grad()
def test_a_shut_gate_keeps_the_partner_out_of_every_layer():
    p = pair(dtype=torch.float32)
    layers = [randomise(StitchFusion(p.video, p.audio), seed) for seed in (1, 2)]

    def through(v, a, control):
        for layer in layers:
            v, a = layer(v, a, p.video, p.audio, control)
        return v.tokens, a.tokens

    other_v, other_a = (replace(s, tokens=torch.randn_like(s.tokens)) for s in (p.v, p.a))
    for off in (0.0, torch.zeros(2)):
        video, audio = through(p.v, p.a, Control(off, 1.0))
        assert torch.equal(through(p.v, other_a, Control(off, 1.0))[0], video)
        assert not torch.equal(through(other_v, p.a, Control(off, 1.0))[1], audio)
        video, audio = through(p.v, p.a, Control(1.0, off))
        assert torch.equal(through(other_v, p.a, Control(1.0, off))[1], audio)
        assert not torch.equal(through(p.v, other_a, Control(1.0, off))[0], video)
        for got, plain in zip(run(layers[0], p, Control(off, off)), without_exchange(p)):
            assert torch.equal(got, plain)


@torch.no_grad()
def test_a_gate_of_one_sample_is_that_samples_own():
    p = pair()
    fusion = randomise(StitchFusion(p.video, p.audio).double())
    mixed = run(fusion, p, Control(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])))
    for sample, control in ((0, Control(1.0, 0.0)), (1, Control(0.0, 1.0))):
        for tokens, alone in zip(mixed, run(fusion, p, control)):
            assert (tokens[sample] - alone[sample])[: 3 if len(tokens[0]) == 5 else 6].abs().max() < 1e-12


@torch.no_grad()
def test_audio_sees_video_that_has_heard_it():
    """Sequential: what audio becomes depends on whether video heard; video not on whether audio sees."""
    p = pair(dtype=torch.float32)
    fusion = StitchFusion(p.video, p.audio, zero_init=False)
    both, deaf, blind = (run(fusion, p, Control(*gates)) for gates in ((1, 1), (0, 1), (1, 0)))
    assert not torch.equal(both[1], deaf[1])
    assert torch.equal(both[0], blind[0])


@pytest.mark.parametrize("detach", [True, False])
def test_gradients_stay_in_their_tower_when_detached(detach):
    p = pair()
    fusion = randomise(StitchFusion(p.video, p.audio, detach=detach).double())
    for s, block in (("v", p.video), ("a", p.audio)):
        setattr(p, s, replace(getattr(p, s), tokens=getattr(p, s).tokens.requires_grad_()))
        block.requires_grad_()
    video, audio = run(fusion, p)
    of_video = dict(zip(("v", "a", "block"), gradients(video, p.v.tokens, p.a.tokens, p.audio.self_attn.v.weight)))
    of_audio = dict(zip(("v", "a", "block"), gradients(audio, p.v.tokens, p.a.tokens, p.video.self_attn.v.weight)))
    assert [of_video[k] is not None for k in ("v", "a", "block")] == [True, not detach, not detach]
    assert [of_audio[k] is not None for k in ("v", "a", "block")] == [not detach, True, not detach]
    # The fusion's own weights learn either way, and the silent frame and the padding leave no NaN.
    for loss, names in ((video, ("to_video", "in_frame", "video")), (audio, ("to_audio", "audio"))):
        weights = [q for name, q in fusion.named_parameters() if name.split(".")[0] in names]
        assert all(g is not None and g.isfinite().all() and g.abs().max() > 0 for g in gradients(loss, *weights))


def gradients(tokens, *inputs):
    return torch.autograd.grad(tokens.square().sum(), inputs, retain_graph=True, allow_unused=True)


@torch.no_grad()
def test_padding_is_not_read():
    p = pair()
    fusion = randomise(StitchFusion(p.video, p.audio).double())
    before = run(fusion, p)
    louder = p.a.tokens.clone()
    louder[1, 3:] = 50
    p.a = replace(p.a, tokens=louder)
    close(run(fusion, p), before)


@torch.no_grad()
def test_starts_as_none():
    starts_as_none(StitchFusion)


def test_starts_at_zero_and_does_not_stay_there():
    """A joint softmax that has no share gives its weights no gradient: they wait for the share to open."""
    first, second = first_gradients(StitchFusion)
    assert first == {"in_frame.v.weight", "in_frame.v.bias", "video.share", "audio.share"}
    assert second == {name for name, _ in StitchFusion(Block(*VIDEO, 8), Block(*AUDIO, 8)).named_parameters()}


@torch.no_grad()
def test_one_whole_model_of_unequal_towers():
    fits_unequal_towers(partial(StitchFusion, inner_dim=20))


def test_a_hidden_width_below_one_is_named():
    with pytest.raises(OviError, match=r"model\.fusion\.inner_dim=0: expected at least 1, or null"):
        StitchFusion(Block(*VIDEO, 8), Block(*AUDIO, 8), inner_dim=0)
