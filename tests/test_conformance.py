"""What every fusion strategy must keep, over the registry: to register one is to test it."""

import copy
import inspect

import pytest
import torch

from ovi.attention import sdpa, use_attention
from ovi.fusion import FUSIONS
from ovi.layout import LatentLayout
from ovi.patch import LinearPatch
from ovi.rope import ROPE_ALIGNMENTS
from small_twins import LAYOUT, inputs, twin, woken

SEQUENTIAL = {"stitch"}
"""Strategies whose second direction reads what the first has written."""

EXCHANGING = [name for name in FUSIONS if name != "none"]
fusions = pytest.mark.parametrize("fusion", list(FUSIONS))
exchanging = pytest.mark.parametrize("fusion", EXCHANGING)
alignments = pytest.mark.parametrize("alignment", list(ROPE_ALIGNMENTS))
UNEQUAL = {"tower": {"dim": 48, "num_heads": 3}, "audio_tower": {"dim": 24, "num_heads": 2}}


def live(fusion, *args, **knobs):
    return woken(twin(fusion, *args, **knobs))


def as_none(model, *args, **knobs):
    """The twin without exchange that has the model's towers."""
    plain = twin("none", *args, **knobs)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("fusions")})
    return plain


def close(ours, expected, **tolerance):
    return all(torch.allclose(a, b, **tolerance) for a, b in zip(ours, expected))


@fusions
@alignments
@torch.no_grad()
def test_off_is_exactly_off(fusion, alignment):
    """With both gates at 0 a fusion equals none, bit for bit."""
    model = live(fusion, alignment)
    expected = as_none(model, alignment)(*inputs())
    assert close(model(*inputs(), a2v=0.0, v2a=0.0), expected, atol=0, rtol=0)


@fusions
@alignments
@torch.no_grad()
def test_gates_of_single_samples(fusion, alignment):
    model = live(fusion, alignment)
    mixed = model(*inputs(), a2v=torch.tensor([1.0, 0.0]), v2a=torch.tensor([1.0, 0.0]))
    on, off = model(*inputs()), model(*inputs(), a2v=0.0, v2a=0.0)
    for m, a, b in zip(mixed, on, off):
        assert torch.allclose(m[0], a[0], atol=1e-5)
        assert torch.allclose(m[1], b[1], atol=1e-5)


@exchanging
@torch.no_grad()
def test_each_gate_rules_its_own_direction(fusion):
    model = live(fusion, tower={"num_blocks": 1})  # one block: no way back
    base = model(*inputs(), a2v=0.0, v2a=0.0)
    hears = model(*inputs(), a2v=1.0, v2a=0.0)
    sees = model(*inputs(), a2v=0.0, v2a=1.0)
    assert (hears[0] - base[0]).abs().max() > 1e-4
    assert torch.equal(hears[1], base[1])
    assert torch.equal(sees[0], base[0])
    assert (sees[1] - base[1]).abs().max() > 1e-4


@exchanging
@torch.no_grad()
def test_both_directions_read_the_same_state(fusion):
    """Through one pair, what a modality hears does not depend on whether the other listened."""
    model = live(fusion, tower={"num_blocks": 1})
    both = model(*inputs())
    video_hears, audio_sees = model(*inputs(), v2a=0.0)[0], model(*inputs(), a2v=0.0)[1]
    assert torch.allclose(both[0], video_hears, atol=1e-6) or fusion in SEQUENTIAL
    assert torch.allclose(both[1], audio_sees, atol=1e-6) or fusion in SEQUENTIAL


@exchanging
@torch.no_grad()
def test_zero_init_starts_as_none(fusion):
    if "zero_init" not in inspect.signature(FUSIONS[fusion]).parameters:
        pytest.skip("exchanges by the towers' own weights")
    model = twin(lambda v, a: FUSIONS[fusion](v, a, zero_init=True))
    assert close(model(*inputs()), as_none(model)(*inputs()), atol=0, rtol=0)


@fusions
@alignments
def test_gradients_reach_every_parameter(fusion, alignment):
    model = live(fusion, alignment)
    video, audio = model(*inputs())
    (video.square().sum() + audio.square().sum()).backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert dead == []


@exchanging
def test_each_modality_learns_from_the_other_s_loss(fusion):
    for mine, other in ((0, "audio."), (1, "video.")):
        model = live(fusion)
        model(*inputs())[mine].square().sum().backward()
        reached = [n for n, p in model.named_parameters() if n.startswith(other) and p.grad is not None]
        assert any(dict(model.named_parameters())[n].grad.abs().max() > 0 for n in reached) or fusion == "stitch"


@fusions
@torch.no_grad()
def test_samples_do_not_see_each_other(fusion):
    model = live(fusion)
    video, audio, sigma, text, _ = inputs(batch=3)
    together = model(video, audio, sigma, text, text)
    order = [2, 0, 1]
    permuted = model(video[order], audio[order], sigma[order], [text[i] for i in order], [text[i] for i in order])
    alone = model(video[1:2], audio[1:2], sigma[1:2], text[1:2], text[1:2])
    for t, p, a in zip(together, permuted, alone):
        assert torch.allclose(t[order], p, atol=2e-5)
        assert torch.allclose(t[1:2], a, atol=2e-5)


@fusions
@torch.no_grad()
def test_masked_audio_tokens_change_nothing(fusion):
    """Padding behind the mask must reach neither the real audio tokens nor the video."""
    model = live(fusion)
    # A convolutional patch sees its neighbours; this is about attention.
    torch.manual_seed(3)
    model.audio.patch_embedding = LinearPatch(6, 24)
    video, audio, sigma, text, _ = inputs(tokens=9)
    mask = torch.arange(9) < torch.tensor([[6], [9]])
    changed = audio.clone()
    changed[0, 6:] = 50.0
    (v, a), (w, b) = (model(video, x, sigma, text, text, audio_mask=mask) for x in (audio, changed))
    assert torch.equal(v[1], w[1])
    assert torch.equal(a[1], b[1])
    assert torch.allclose(v[0], w[0], atol=1e-5)
    assert torch.allclose(a[0, :6], b[0, :6], atol=1e-5)


@fusions
@torch.no_grad()
def test_towers_of_unequal_width(fusion):
    """No strategy needs equal widths as it comes; ``joint`` with tied weights does, and says so."""
    model = live(fusion, **copy.deepcopy(UNEQUAL))
    expected = as_none(model, **copy.deepcopy(UNEQUAL))(*inputs())
    assert close(model(*inputs(), a2v=0.0, v2a=0.0), expected, atol=0, rtol=0)
    assert fusion == "none" or (model(*inputs())[0] - expected[0]).abs().max() > 1e-4


@fusions
@torch.no_grad()
def test_towers_of_unequal_depth(fusion):
    model = live(fusion, tower={"num_blocks": 3}, audio_tower={"num_blocks": 2}, plan=[[0, 0], [2, 1]])
    assert model.plan == [(0, 0), (1, None), (2, 1)]
    expected = as_none(model, tower={"num_blocks": 3}, audio_tower={"num_blocks": 2})(*inputs())
    assert close(model(*inputs(), a2v=0.0, v2a=0.0), expected, atol=0, rtol=0)


@fusions
@torch.no_grad()
def test_bfloat16_is_near_float32(fusion):
    model = live(fusion)
    video, audio, sigma, text, _ = inputs()
    exact = model(video, audio, sigma, text, text)
    half = model.to(torch.bfloat16)(video.bfloat16(), audio.bfloat16(), sigma, text, text)
    for a, b in zip(half, exact):
        assert a.dtype == torch.bfloat16
        assert (a - b).norm() < 0.05 * b.norm()


@fusions
@torch.no_grad()
def test_state_goes_out_and_in(fusion, tmp_path):
    model, other = live(fusion), twin(fusion, seed=5)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    assert not close(other(*inputs()), model(*inputs()), atol=1e-3)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert close(other(*inputs()), model(*inputs()), atol=0, rtol=0)


@fusions
def test_the_host_never_waits_for_the_device(fusion):
    """A meta tensor has no values: whatever asked for one would raise here, and stall a GPU."""
    model = twin(fusion).to("meta")
    video, audio, sigma, text, _ = inputs()
    text = [t.to("meta") for t in text]
    mask = torch.ones(2, 9, dtype=torch.bool, device="meta")
    half = torch.ones(2, device="meta")
    v, a = model(
        video.to("meta"), audio.to("meta"), sigma.to("meta"), text, text, clean_first_frame=True, audio_mask=mask,
        a2v=half, v2a=half,
    )  # fmt: skip
    (v.sum() + a.sum()).backward()
    assert v.shape == video.shape
    assert a.shape == audio.shape


@fusions
@torch.no_grad()
def test_a_given_first_frame_and_one_sample(fusion):
    """Two segments in the video's stream; the clean frame's timestep makes a difference."""
    model = live(fusion)
    video, audio, sigma, text, _ = inputs(batch=1)
    clean, noisy = (model(video, audio, sigma, text, text, clean_first_frame=c) for c in (True, False))
    assert not torch.allclose(clean[0], noisy[0], atol=1e-4)


@exchanging
def test_knobs_say_what_they_do(fusion):
    """Every knob's alternatives build and change something or are refused: no knob is dead."""
    base = dict(FUSIONS.knobs(fusion))
    for name, knob in base.items():
        if not isinstance(knob.default, bool) or name == "zero_init":
            continue
        results = []
        for x in (True, False):
            model = woken(twin(lambda v, u, n=name, x=x: FUSIONS[fusion](v, u, **{n: x})))
            video, audio = model(*inputs())
            (video.square().sum() + audio.square().sum()).backward()
            # What a knob changes may be the gradient alone.
            gradients = [p.grad.norm() for p in (*model.video.parameters(), *model.audio.parameters())]
            results.append((video.detach(), audio.detach(), torch.stack(gradients)))
        assert not close(*results, atol=1e-6), name


@fusions
@torch.no_grad()
def test_padding_of_prompts_is_that_of_the_reference(fusion):
    """Few rows stand for the zero-padding to 150 that is written out beside."""
    model = live(fusion, layout=LatentLayout(4, 6, 8, 150, LAYOUT.clock))
    video, audio, sigma, text, _ = inputs()
    padded = torch.stack([torch.nn.functional.pad(t, (0, 0, 0, 150 - len(t))) for t in text])
    assert close(model(video, audio, sigma, text, text), model(video, audio, sigma, padded, padded), atol=3e-5)


@fusions
def test_mixed_precision_trains_like_full(fusion):
    """Under autocast: attention gets one type, and gradients are those of float32 but for rounding."""
    gradients = []
    for enabled in (False, True):
        model = live(fusion)
        seen = set()
        use_attention(
            model,
            lambda q, k, v, mask=None, seen=seen: seen.update((q.dtype, k.dtype, v.dtype)) or sdpa()(q, k, v, mask),
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            video, audio = model(*inputs())
        (video.float().square().sum() + audio.float().square().sum()).backward()
        assert seen == {torch.bfloat16 if enabled else torch.float32}
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert gradients[-1].dtype == torch.float32
    exact, mixed = gradients
    assert (mixed - exact).norm() < 0.1 * exact.norm()
