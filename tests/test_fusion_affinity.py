"""The affinity fusion against one explicit matrix with two softmaxes."""

import pytest
import torch

from ovi.block import Block
from ovi.errors import OviError
from ovi.fusion import AffinityFusion
from ovi.stream import Control
from plain_pair import (
    attentions,
    close,
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
    run,
    split,
    starts_as_none,
)


def expected(p, fusion, heads, control):
    v, a = feed_forwards(p, *attentions(p, p.v.tokens, p.a.tokens))
    f, g = fusion.video, fusion.audio  # hold the weights
    p_v, p_a = split(linear(f.p, norm(v)), heads), split(linear(g.p, norm(a)), heads)
    s = torch.einsum("bhid,bhjd->bhij", p_v, p_a) / p_v.shape[-1] ** 0.5
    rows = s.masked_fill(~p.a.mask[:, None, None], -torch.inf).exp()
    rows = rows / rows.sum(-1, keepdim=True)
    columns = s.exp() / s.exp().sum(-2, keepdim=True)
    hears = torch.einsum("bhij,bhjd->bhid", rows, split(linear(g.v, norm(a)), heads))
    sees = torch.einsum("bhij,bhid->bhjd", columns, split(linear(f.v, norm(v)), heads))
    return (
        v + gate_of(control.a2v) * f.gain * linear(f.o, join(hears)),
        a + gate_of(control.v2a) * g.gain * linear(g.o, join(sees)),
    )


@pytest.mark.parametrize(("inner_dim", "heads"), [(None, 1), (24, 2), (36, 3)])
@torch.no_grad()
def test_is_its_mathematics(inner_dim, heads):
    p = pair()
    fusion = randomise(AffinityFusion(p.video, p.audio, inner_dim=inner_dim).double())
    for control in (Control(), Control(0.3, torch.tensor([0.0, 2.0])), Control(torch.tensor([0.5, 1.0]), 0.0)):
        close(run(fusion, p, control), expected(p, fusion, heads, control))


@torch.no_grad()
def test_the_audio_tower_may_be_the_wider_one():
    p = pair(video=(24, 2), audio=(48, 3))
    fusion = randomise(AffinityFusion(p.video, p.audio, inner_dim=24).double())
    close(run(fusion, p), expected(p, fusion, 2, Control()))


def count(video, audio, **knobs):
    with torch.device("meta"):
        fusion = AffinityFusion(Block(*video, 8), Block(*audio, 8), **knobs)
    return sum(p.numel() for p in fusion.parameters())


def test_parameters():
    """The formula of the spec at equal widths, 3 D^2; biases and gains exactly; its general form."""
    for dim, heads in ((3072, 24), (24, 2)):
        assert count((dim, heads), (dim, heads)) == 3 * dim**2 + 6 * dim
    for inner_dim, i in ((None, 12), (24, 24), (60, 60)):
        assert count((48, 3), (24, 2), inner_dim=inner_dim) == 3 * i * 72 + 4 * i + 2 * 72
    assert count((36, 3), (60, 5)) == 3 * 12 * 96 + 4 * 12 + 2 * 96  # half of three heads is one
    assert count((24, 1), (24, 1)) == 3 * 24 * 48 + 4 * 24 + 2 * 48  # half of one head is that one


@torch.no_grad()
def test_starts_as_none():
    starts_as_none(AffinityFusion)


def test_starts_at_zero_and_does_not_stay_there():
    first, second = first_gradients(AffinityFusion)
    assert first == {"video.gain", "audio.gain"}
    assert second == {name for name, _ in AffinityFusion(Block(48, 3, 8), Block(24, 2, 8)).named_parameters()}


@torch.no_grad()
def test_both_directions_read_before_either_writes():
    reads_before_writing(AffinityFusion)


@torch.no_grad()
def test_one_whole_model_of_unequal_towers():
    fits_unequal_towers(AffinityFusion)


@pytest.mark.parametrize("inner_dim", [0, 18, -12])
def test_a_width_must_split_into_heads(inner_dim):
    with pytest.raises(OviError, match=rf"model\.fusion\.inner_dim={inner_dim}: expected a multiple of 12, the head"):
        AffinityFusion(Block(48, 3, 8), Block(24, 2, 8), inner_dim=inner_dim)
