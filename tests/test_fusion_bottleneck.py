"""The bottleneck fusion against its mathematics written out plainly, and the narrowness that gives it its name."""

from dataclasses import replace

import pytest
import torch

from ovi.block import Block
from ovi.errors import OviError
from ovi.fusion import BottleneckFusion
from ovi.stream import Control
from plain_pair import (
    AUDIO,
    VIDEO,
    attend,
    close,
    cross_attention,
    feed_forwards,
    first_gradients,
    fits_unequal_towers,
    gate_of,
    join,
    linear,
    norm,
    pair,
    randomise,
    reads_before_writing,
    rms,
    run,
    self_attention,
    split,
    starts_as_none,
    without_exchange,
)


def expected(p, fusion, heads, control):
    streams = {}
    tokens = 0
    for name, block, s, side in (("v", p.video, p.v, fusion.video), ("a", p.audio, p.a, fusion.audio)):
        x = self_attention(block, s, s.tokens, p.angles[name]["own"])
        y = norm(x) * side.norm.weight + side.norm.bias
        q = split(rms(fusion.norm_q, fusion.tokens).expand(2, -1, -1), heads)
        k, values = split(rms(side.norm_k, linear(side.k, y)), heads), split(linear(side.v, y), heads)
        tokens = tokens + (fusion.tokens + join(attend(q, k, values, s.mask))) / 2
        streams[name] = x, y
    k, values = split(rms(fusion.norm_k, linear(fusion.k, tokens)), heads), split(linear(fusion.v, tokens), heads)
    results = []
    for name, block, s, side, gate in (
        ("v", p.video, p.v, fusion.video, control.a2v),
        ("a", p.audio, p.a, fusion.audio, control.v2a),
    ):
        x, y = streams[name]
        read = attend(split(rms(side.norm_q, linear(side.q, y)), heads), k, values)
        results.append(cross_attention(block, s, x + gate_of(gate) * linear(side.o, join(read))))
    return feed_forwards(p, *results)


@pytest.mark.parametrize(("num_tokens", "inner_dim", "heads"), [(4, None, 1), (1, 24, 2), (7, 36, 3)])
@torch.no_grad()
def test_is_its_mathematics(num_tokens, inner_dim, heads):
    p = pair()
    fusion = randomise(BottleneckFusion(p.video, p.audio, num_tokens=num_tokens, inner_dim=inner_dim).double())
    for control in (Control(), Control(0.3, torch.tensor([0.0, 2.0])), Control(torch.tensor([0.5, 1.0]), 0.0)):
        close(run(fusion, p, control), expected(p, fusion, heads, control))


@torch.no_grad()
def test_the_audio_tower_may_be_the_wider_one():
    p = pair(video=AUDIO, audio=VIDEO)
    fusion = randomise(BottleneckFusion(p.video, p.audio, inner_dim=24).double())
    close(run(fusion, p), expected(p, fusion, 2, Control()))


def test_parameters():
    """The formula of the docstring; the default width is half of the narrower tower's heads, at least one."""
    for (v, heads_v), (a, heads_a), knobs, n, i in (
        (VIDEO, AUDIO, {}, 4, 12),
        (VIDEO, AUDIO, {"inner_dim": 60, "num_tokens": 9}, 9, 60),
        ((3072, 24), (3072, 24), {}, 4, 1536),
        ((4096, 32), (2048, 32), {}, 4, 1024),
        ((24, 1), (24, 1), {}, 4, 24),
    ):
        with torch.device("meta"):
            fusion = BottleneckFusion(Block(v, heads_v, 8), Block(a, heads_a, 8), **knobs)
        count = sum(p.numel() for p in fusion.parameters())
        assert count == 4 * i * (v + a) + 2 * i**2 + 3 * (v + a) + (n + 14) * i


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_all_that_crosses_passes_through_the_tokens(num_tokens):
    """Video's derivative by audio has the rank of the tokens' numbers at most: 12 each, out of 120."""
    p = pair()
    fusion = randomise(BottleneckFusion(p.video, p.audio, num_tokens=num_tokens, inner_dim=12).double())

    def video_of(audio):
        return fusion(p.v, replace(p.a, tokens=audio, mask=None), p.video, p.audio, Control())[0].tokens[0]

    jacobian = torch.autograd.functional.jacobian(video_of, p.a.tokens)[:, :, 0].flatten(2).flatten(0, 1)
    assert jacobian.shape == (6 * 48, 5 * 24)
    values = torch.linalg.svdvals(jacobian)
    assert (values > values[0] * 1e-12).sum() <= num_tokens * 12
    assert values[num_tokens * 12 - 3] > values[0] * 1e-9  # and uses (nearly) all of it


@torch.no_grad()
def test_a_shut_gate_keeps_the_partner_out_of_every_layer():
    """Not by way of the tokens either, which have read both: in two layers, one direction open, the other shut."""
    p, layers = pair(dtype=torch.float32), []
    for seed in (1, 2):
        fusion = BottleneckFusion(p.video, p.audio, zero_init=False)
        layers.append(randomise(fusion, seed))

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
def test_padding_is_not_read():
    p = pair()
    fusion = randomise(BottleneckFusion(p.video, p.audio).double())
    before = run(fusion, p)
    louder = p.a.tokens.clone()
    louder[1, 3:] = 50
    p.a = replace(p.a, tokens=louder)
    close(run(fusion, p), before)


@torch.no_grad()
def test_starts_as_none():
    starts_as_none(BottleneckFusion)


def test_starts_at_zero_and_does_not_stay_there():
    first, second = first_gradients(BottleneckFusion)
    assert first == {f"{side}.o.{what}" for side in ("video", "audio") for what in ("weight", "bias")}
    assert second == {name for name, _ in BottleneckFusion(Block(*VIDEO, 8), Block(*AUDIO, 8)).named_parameters()}


@torch.no_grad()
def test_both_directions_read_before_either_writes():
    reads_before_writing(BottleneckFusion)


@torch.no_grad()
def test_one_whole_model_of_unequal_towers():
    fits_unequal_towers(BottleneckFusion)


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"inner_dim": 18}, r"model\.fusion\.inner_dim=18: expected a multiple of 12, the head width of the narrower"),
        ({"inner_dim": 0}, r"model\.fusion\.inner_dim=0: expected a multiple of 12"),
        ({"num_tokens": 0}, r"model\.fusion\.num_tokens=0: expected at least 1; model/fusion=none"),
    ],
)
def test_sizes_that_do_not_fit_are_named(knobs, says):
    with pytest.raises(OviError, match=says):
        BottleneckFusion(Block(*VIDEO, 8), Block(*AUDIO, 8), **knobs)
