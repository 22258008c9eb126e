"""The bridge against its mathematics written out plainly, its published forms, and its knobs."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from ovi.block import Block
from ovi.errors import OviError
from ovi.fusion import BridgeFusion, LTX2Fusion, MOVAFusion
from ovi.fusion.bridge import GATES, SITES
from ovi.stream import Control
from plain_pair import (
    attend,
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
    per_token,
    randomise,
    reads_before_writing,
    rms,
    run,
    split,
    starts_as_none,
    turn,
    without_exchange,
)

WIDTHS = {"v": (48, 16), "a": (24, 12)}


def hears(p, side, who, x, y, adaln, gate):
    """What one modality hears, [B, L, D]; ``side`` only holds weights."""
    own, other = getattr(p, who), getattr(p, {"v": "a", "a": "v"}[who])
    if adaln:
        b, s = (side.modulation_q[i] + own.time for i in (0, 1))
        q_of = norm(x) * (1 + per_token(own, s)) + per_token(own, b)
        b, s = (side.modulation_kv[i] + other.time for i in (0, 1))
        kv_of = norm(y) * (1 + per_token(other, s)) + per_token(other, b)
    else:
        q_of, kv_of = x, norm(y) * side.norm_kv.weight + side.norm_kv.bias
    heads = side.q.out_features // WIDTHS[who][1]
    q = turn(split(rms(side.norm_q, linear(side.q, q_of)), heads), p.angles[who]["queries"])
    k = turn(split(rms(side.norm_k, linear(side.k, kv_of)), heads), p.angles[who]["partner"])
    result = attend(q, k, split(linear(side.v, kv_of), heads), other.mask)
    if gate == "head":
        result = result * 2 / (1 + torch.exp(-linear(side.head_gate, q_of).transpose(1, 2)[..., None]))
    term = linear(side.o, join(result))
    if gate == "scalar":
        term = term * side.gain
    if gate == "partner_sigma":
        term = term * (side.gain + linear(side.partner_time, other.time[:, -1]))[:, None]
    return term


def expected(p, fusion, site, adaln, gate, control):
    v, a = p.v.tokens, p.a.tokens
    if site == "after":
        v, a = attentions(p, v, a)
    v, a = (
        v + gate_of(control.a2v) * hears(p, fusion.video, "v", v, a, adaln, gate),
        a + gate_of(control.v2a) * hears(p, fusion.audio, "a", a, v, adaln, gate),
    )
    return feed_forwards(p, v, a) if site == "after" else feed_forwards(p, *attentions(p, v, a))


def bridge(p, kind=BridgeFusion, **knobs):
    return randomise(kind(p.video, p.audio, **knobs).double())


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("adaln", [True, False])
@pytest.mark.parametrize("site", SITES)
@torch.no_grad()
def test_is_its_mathematics(site, adaln, gate):
    p = pair()
    for inner_dim in (None, "own", 48):
        fusion = bridge(p, site=site, adaln=adaln, gate=gate, inner_dim=inner_dim)
        for control in (Control(), Control(0.3, torch.tensor([0.0, 2.0])), Control(torch.tensor([0.5, 1.0]), 0.0)):
            close(run(fusion, p, control), expected(p, fusion, site, adaln, gate, control))


@pytest.mark.parametrize(
    ("kind", "settings"), [(LTX2Fusion, ("after", True, "partner_sigma")), (MOVAFusion, ("before", False, "none"))]
)
@torch.no_grad()
def test_published_forms_are_settings_of_the_bridge(kind, settings):
    p = pair()
    fusion = bridge(p, kind)
    close(run(fusion, p), expected(p, fusion, *settings, Control()))
    inner = [side.q.out_features for side in (fusion.video, fusion.audio)]
    assert inner == ([16, 24] if kind is LTX2Fusion else [48, 24])


def count(kind, video, audio, **knobs):
    with torch.device("meta"):
        fusion = kind(Block(*video, 8), Block(*audio, 8), **knobs)
    return sum(p.numel() for p in fusion.parameters())


@pytest.mark.parametrize(("video", "audio"), [((4096, 32), (2048, 16)), ((3072, 24), (3072, 24)), ((48, 4), (24, 2))])
def test_parameters_of_the_published_forms(video, audio):
    """The formulas of the spec; on top come biases and the norms' scales, exactly."""
    d = video[0] + audio[0]
    i = min(video[0], audio[0])
    sigma = 2 * video[0] * audio[0] if video[0] != audio[0] else 0
    assert count(LTX2Fusion, video, audio) == (4 * i * d + 5 * d) + (10 * i + d) + sigma
    assert count(MOVAFusion, video, audio) == 2 * d**2 + 8 * d


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("adaln", [True, False])
@pytest.mark.parametrize("inner_dim", [None, "own", 48])
def test_parameters(inner_dim, adaln, gate):
    total = count(BridgeFusion, (48, 3), (24, 2), inner_dim=inner_dim, adaln=adaln, gate=gate)
    inner = {None: (16, 24), "own": (48, 24), 48: (48, 48)}[inner_dim]
    heads = inner[0] // 16, inner[1] // 12
    gates = {"none": 0, "scalar": 2, "head": 49 * heads[0] + 25 * heads[1], "partner_sigma": 72 + 2 * 48 * 24}
    assert total == 2 * sum(inner) * 72 + 5 * sum(inner) + 72 + (4 if adaln else 2) * 72 + gates[gate]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("site", SITES)
@torch.no_grad()
def test_starts_as_none(site, gate):
    starts_as_none(BridgeFusion, site=site, gate=gate)


@pytest.mark.parametrize("gate", GATES)
def test_starts_at_zero_and_does_not_stay_there(gate):
    """One step moves the output projection alone; then everything gets a gradient."""
    first, second = first_gradients(partial(BridgeFusion, gate=gate))
    assert first == {f"{side}.o.{what}" for side in ("video", "audio") for what in ("weight", "bias")}
    assert second == {name for name, _ in BridgeFusion(Block(48, 3, 8), Block(24, 2, 8), gate=gate).named_parameters()}


@pytest.mark.parametrize("site", SITES)
@torch.no_grad()
def test_both_directions_read_before_either_writes(site):
    reads_before_writing(BridgeFusion, site=site)


@pytest.mark.parametrize("kind", [LTX2Fusion, MOVAFusion])
@torch.no_grad()
def test_one_whole_model_of_unequal_towers(kind):
    fits_unequal_towers(kind)


def other_time(stream, segment, seed=5):
    """The stream at another noise level of one segment."""
    time = stream.time.clone()
    time[:, segment] = torch.randn(time[:, segment].shape, generator=torch.Generator().manual_seed(seed))
    return replace(stream, time=time)


@torch.no_grad()
def test_the_gate_knows_the_partners_sigma_and_not_its_own():
    p = pair()
    fusion = bridge(p, adaln=False, gate="partner_sigma")  # without AdaLN the timestep enters by the gate alone
    before = run(fusion, p)
    p.v = other_time(p.v, -1)
    after = run(fusion, p)
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])
    p.v, p.a = pair().v, other_time(p.a, -1)
    after = run(fusion, p)
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])


@torch.no_grad()
def test_a_given_first_frame_does_not_open_the_gate():
    p = pair()
    fusion = bridge(p, adaln=False, gate="partner_sigma")
    before = run(fusion, p)
    p.v = other_time(p.v, 0)
    for a, b in zip(run(fusion, p), before):
        assert torch.equal(a, b)


@pytest.mark.parametrize("audio", [(24, 2), (48, 3)])
@torch.no_grad()
def test_a_noisy_partner_can_be_shut_out(audio):
    """A table of minus the embedding of one sigma closes the direction at that sigma, exactly, and at no other."""
    p = pair(audio=audio)
    p.a.time[1] = p.a.time[0]
    fusion = BridgeFusion(p.video, p.audio, gate="partner_sigma", zero_init=False).double()
    fusion.video.gain.copy_(-fusion.video.partner_time(p.a.time[0, -1]))
    shut, none = run(fusion, p), without_exchange(p)
    assert (shut[0] - none[0]).abs().max() < 1e-12
    assert not torch.allclose(shut[1], none[1])
    p.a = other_time(p.a, -1)
    assert not torch.allclose(run(fusion, p)[0], none[0])


@torch.no_grad()
def test_learned_gates_start_open():
    """A gate per head and a scalar change no number before they are trained."""
    p = pair()
    torch.manual_seed(0)
    plain = BridgeFusion(p.video, p.audio, gate="none", zero_init=False).double()
    for gate in ("scalar", "head"):
        gated = BridgeFusion(p.video, p.audio, gate=gate, zero_init=False).double()
        gated.load_state_dict(plain.state_dict(), strict=False)
        for a, b in zip(run(gated, p), run(plain, p)):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"site": "between"}, r"model\.fusion\.site=between: expected before, after"),
        ({"gate": "tanh"}, r"model\.fusion\.gate=tanh: expected none, scalar, head, partner_sigma"),
        ({"inner_dim": 32}, r"model\.fusion\.inner_dim=32: expected a multiple of both towers' head widths, 12 and 16"),
        ({"inner_dim": 24}, r"model\.fusion\.inner_dim=24: expected a multiple of both towers' head widths, 16 and 12"),
        ({"inner_dim": 0}, r"model\.fusion\.inner_dim=0"),
        ({"inner_dim": "all"}, r"model\.fusion\.inner_dim=all: .* or own, or null"),
    ],
)
def test_bad_knobs_are_named(knobs, says):
    with pytest.raises(OviError, match=says):
        BridgeFusion(Block(48, 3, 8), Block(24, 2, 8), **knobs)


def test_a_tower_narrower_than_one_head_of_the_other():
    """Rounding down would leave no head at all: there is always one."""
    assert count(BridgeFusion, (96, 2), (24, 2), gate="none", adaln=False) == 2 * 72 * 120 + 5 * 72 + 3 * 120
