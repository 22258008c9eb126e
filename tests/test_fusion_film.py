"""The FiLM baseline against its mathematics written out plainly."""

from dataclasses import replace

import pytest
import torch

from ovi.block import Block
from ovi.fusion import FiLMFusion
from ovi.stream import Control
from plain_pair import (
    attentions,
    close,
    feed_forward,
    first_gradients,
    fits_unequal_towers,
    gate_of,
    linear,
    norm,
    pair,
    randomise,
    reads_before_writing,
    run,
    starts_as_none,
)


def summary(tokens, mask):
    """Mean of each sample's real tokens, normed, [B, D]."""
    if mask is None:
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
    return norm(torch.stack([x[real].mean(0) for x, real in zip(tokens, mask)]))


def expected(p, fusion, control):
    v, a = attentions(p, p.v.tokens, p.a.tokens)
    results = []
    for block, s, x, y, mask, side, gate in (
        (p.video, p.v, v, a, p.a.mask, fusion.video, control.a2v),
        (p.audio, p.a, a, v, p.v.mask, fusion.audio, control.v2a),
    ):
        shift, scale = (gate_of(gate) * linear(side.linear, summary(y, mask))[:, None]).chunk(2, -1)
        results.append(feed_forward(block, s, x, shift, scale))
    return results


@pytest.mark.parametrize("video_mask", [None, [[True] * 6, [True, False, True, True, False, True]]])
@torch.no_grad()
def test_is_its_mathematics(video_mask):
    p = pair()
    if video_mask is not None:
        p.v = replace(p.v, mask=torch.tensor(video_mask))
    fusion = randomise(FiLMFusion(p.video, p.audio).double())
    for control in (Control(), Control(0.3, torch.tensor([0.0, 2.0])), Control(torch.tensor([0.5, 1.0]), 0.0)):
        close(run(fusion, p, control), expected(p, fusion, control))


@torch.no_grad()
def test_the_timesteps_modulation_goes_on_unchanged():
    p = pair()
    fusion = randomise(FiLMFusion(p.video, p.audio).double())
    v, a = fusion(p.v, p.a, p.video, p.audio, Control())
    assert v.modulation is p.v.modulation
    assert a.modulation is p.a.modulation


@torch.no_grad()
def test_the_order_of_the_partners_tokens_is_not_heard():
    """The baseline cannot know when: what video becomes is the same whatever the order of the audio tokens."""
    p = pair()
    p.a = replace(p.a, mask=None)
    fusion = randomise(FiLMFusion(p.video, p.audio).double())
    before = run(fusion, p)[0]
    order = [3, 0, 4, 1, 2]
    p.a = replace(p.a, tokens=p.a.tokens[:, order], rope=p.a.rope[order])
    assert (run(fusion, p)[0] - before).abs().max() < 1e-12
    p.a = replace(p.a, tokens=p.a.tokens * torch.linspace(0.5, 3, 5, dtype=torch.float64)[:, None])
    assert (run(fusion, p)[0] - before).abs().max() > 1e-3


def test_parameters():
    for (v, heads_v), (a, heads_a) in (((48, 3), (24, 2)), ((3072, 24), (3072, 24)), ((4096, 32), (2048, 32))):
        with torch.device("meta"):
            fusion = FiLMFusion(Block(v, heads_v, 8), Block(a, heads_a, 8))
        assert sum(p.numel() for p in fusion.parameters()) == 4 * v * a + 2 * (v + a)


@torch.no_grad()
def test_starts_as_none():
    starts_as_none(FiLMFusion)


def test_every_weight_learns_from_the_first_step():
    (first,) = first_gradients(FiLMFusion, steps=1)
    assert first == {f"{side}.linear.{what}" for side in ("video", "audio") for what in ("weight", "bias")}


@torch.no_grad()
def test_both_directions_read_before_either_writes():
    reads_before_writing(FiLMFusion)


@torch.no_grad()
def test_one_whole_model_of_unequal_towers():
    fits_unequal_towers(FiLMFusion)
