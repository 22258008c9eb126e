"""The twin's own properties, over every registered fusion and alignment."""

from functools import partial

import pytest
import torch

from ovi.clock import Clock
from ovi.errors import OviError
from ovi.fusion import FUSIONS, OviFusion
from ovi.layout import LatentLayout
from ovi.patch import PATCHES, AudioPatch, LinearPatch, VideoPatch, sinusoid
from ovi.rope import ROPE_ALIGNMENTS
from ovi.stream import gated, modulate
from ovi.tower import Tower, pad_text
from ovi.twin import build_twin

LAYOUT = LatentLayout(4, 6, 8, 5, Clock(fps=8, video_stride=1, causal_first_frame=False))
TOWER = {"dim": 24, "num_heads": 2, "num_blocks": 2, "ffn_dim": 32, "freq_dim": 16}


def twin(fusion="ovi", alignment="seconds", layout=LAYOUT, seed=0, live=True, **knobs):
    torch.manual_seed(seed)
    tower = {**TOWER, **knobs.pop("tower", {})}
    model = build_twin(
        layout,
        video=partial(Tower, patch=VideoPatch, **tower),
        audio=partial(Tower, patch=AudioPatch, **tower),
        fusion=FUSIONS[fusion] if isinstance(fusion, str) else fusion,
        rope_alignment=ROPE_ALIGNMENTS[alignment],
        **knobs,
    ).eval()
    if live:  # the head starts at zero: without this every output would be its bias
        for tower in (model.video, model.audio):
            torch.nn.init.normal_(tower.out.head.weight, std=0.3)
    return model


def inputs(batch=2, frames=4, tokens=9, seed=1):
    g = torch.Generator().manual_seed(seed)
    video = torch.randn(batch, 4, frames, 4, 4, generator=g)
    audio = torch.randn(batch, tokens, 6, generator=g)
    text = [torch.randn(1 + i % 5, 8, generator=g) for i in range(batch)]
    return video, audio, torch.linspace(0.2, 0.9, batch), text, text


fusions = pytest.mark.parametrize("fusion", list(FUSIONS))
alignments = pytest.mark.parametrize("alignment", list(ROPE_ALIGNMENTS))


@fusions
@alignments
@torch.no_grad()
def test_off_is_exactly_off(fusion, alignment):
    """With both gates at 0 a fusion equals none, bit for bit, whether the gate is a number or one per sample."""
    model, plain = twin(fusion, alignment), twin("none", alignment)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("fusions")})
    expected = plain(*inputs())
    for gate in (0.0, torch.zeros(2)):
        for a, b in zip(model(*inputs(), a2v=gate, v2a=gate), expected):
            assert torch.equal(a, b)


@fusions
@torch.no_grad()
def test_each_gate_rules_its_own_direction(fusion):
    if fusion == "none":
        pytest.skip("nothing is exchanged")
    model = twin(fusion, tower={"num_blocks": 1})  # one block: no way back
    base = model(*inputs(), a2v=0.0, v2a=0.0)
    hears = model(*inputs(), a2v=1.0, v2a=0.0)
    sees = model(*inputs(), a2v=0.0, v2a=1.0)
    assert not torch.equal(hears[0], base[0])
    assert torch.equal(hears[1], base[1])
    assert torch.equal(sees[0], base[0])
    assert not torch.equal(sees[1], base[1])


@fusions
@torch.no_grad()
def test_gates_of_single_samples(fusion):
    model = twin(fusion)
    mixed = model(*inputs(), a2v=torch.tensor([1.0, 0.0]), v2a=torch.tensor([1.0, 0.0]))
    on, off = model(*inputs()), model(*inputs(), a2v=0.0, v2a=0.0)
    for m, a, b in zip(mixed, on, off):
        assert torch.allclose(m[0], a[0], atol=1e-6)
        assert torch.allclose(m[1], b[1], atol=1e-6)


@fusions
@alignments
def test_gradients_reach_every_parameter(fusion, alignment):
    model = twin(fusion, alignment)
    video, audio = model(*inputs())
    (video.square().sum() + audio.square().sum()).backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert dead == []


@fusions
@torch.no_grad()
def test_samples_do_not_see_each_other(fusion):
    model = twin(fusion)
    video, audio, sigma, text, _ = inputs(batch=3)
    together = model(video, audio, sigma, text, text)
    order = [2, 0, 1]
    permuted = model(video[order], audio[order], sigma[order], [text[i] for i in order], [text[i] for i in order])
    alone = model(video[1:2], audio[1:2], sigma[1:2], text[1:2], text[1:2])
    for t, p, a in zip(together, permuted, alone):
        assert torch.allclose(t[order], p, atol=1e-5)
        assert torch.allclose(t[1:2], a, atol=1e-5)


@fusions
@torch.no_grad()
def test_masked_audio_tokens_change_nothing(fusion):
    """Padding behind the mask must reach neither the real audio tokens nor the video."""
    model = twin(fusion, tower={})
    # A convolutional patch sees its neighbours; this is about attention.
    torch.manual_seed(3)
    model.audio.patch_embedding = LinearPatch(6, 24)
    video, audio, sigma, text, _ = inputs(tokens=9)
    mask = torch.arange(9) < torch.tensor([[6], [9]])
    changed = audio.clone()
    changed[0, 6:] = 50.0
    for a, b in zip(
        model(video, audio, sigma, text, text, audio_mask=mask),
        model(video, changed, sigma, text, text, audio_mask=mask),
    ):
        assert torch.equal(a[1], b[1])
        assert torch.allclose(a[0][:6] if a.dim() == 3 else a[0], b[0][:6] if b.dim() == 3 else b[0], atol=1e-5)


def test_training_may_follow_a_validation_in_inference_mode():
    """Tables that are built once must not be inference tensors, which autograd refuses."""
    model = twin("ovi")
    with torch.inference_mode():
        before = model(*inputs())
    after = model(*inputs())
    after[0].sum().backward()
    assert torch.equal(before[0], after[0])


@torch.no_grad()
def test_zero_init_starts_as_none():
    model = twin(partial(OviFusion, zero_init=True))
    for a, b in zip(model(*inputs()), model(*inputs(), a2v=0.0, v2a=0.0)):
        assert torch.equal(a, b)


@torch.no_grad()
def test_one_modality_alone_is_the_twin_without_exchange():
    model = twin("ovi")
    video, audio, sigma, text, _ = inputs()
    both = model(video, audio, sigma, text, text, a2v=0.0, v2a=0.0)
    v, nothing = model(video, None, sigma, text, None)
    assert nothing is None
    assert torch.equal(v, both[0])
    nothing, a = model(None, audio, sigma, None, text)
    assert nothing is None
    assert torch.equal(a, both[1])


@torch.no_grad()
def test_independent_noise_levels():
    model = twin("none")
    video, audio, sigma, text, _ = inputs()
    pair = model(video, audio, (sigma, 1 - sigma), text, text)
    assert torch.equal(pair[0], model(video, audio, sigma, text, text)[0])
    assert torch.equal(pair[1], model(video, audio, 1 - sigma, text, text)[1])


@torch.no_grad()
def test_skipped_blocks_are_left_out_whole():
    model = twin("ovi")
    short = twin("ovi", tower={"num_blocks": 1})
    kept = {
        k.replace("blocks.1.", "blocks.0.").replace("fusions.1.", "fusions.0."): v
        for k, v in model.state_dict().items()
        if "blocks.0." not in k and "fusions.0." not in k
    }
    short.load_state_dict(kept)
    for a, b in zip(model(*inputs(), skip_blocks=[0]), short(*inputs())):
        assert torch.equal(a, b)


@torch.no_grad()
def test_padding_of_prompts_is_hidden_when_asked():
    """Two text lengths give the same numbers only where the padding is masked."""

    def outputs(text_len, masked):
        layout = LatentLayout(4, 6, 8, text_len, LAYOUT.clock)
        return twin("ovi", layout=layout, tower={"mask_text_padding": masked})(*inputs())[0]

    assert torch.allclose(outputs(5, True), outputs(9, True), atol=1e-5)
    assert not torch.allclose(outputs(5, False), outputs(9, False), atol=1e-3)


def test_padding_is_zeros_behind_the_prompt():
    padded, lengths = pad_text([torch.ones(2, 8), torch.ones(5, 8)], 5, 8)
    assert lengths.tolist() == [2, 5]
    assert padded.sum().item() == 7 * 8
    assert padded[0, 2:].abs().sum() == 0


def test_two_segments_equal_a_modulation_per_token():
    x, shift, scale = torch.randn(2, 7, 3), torch.randn(2, 2, 3), torch.randn(2, 2, 3)
    each = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    assert torch.allclose(modulate(x, shift, scale, (3, 4)), x * (1 + scale[:, each]) + shift[:, each], atol=1e-6)
    assert torch.allclose(gated(x, scale, (3, 4)), x * scale[:, each], atol=1e-6)
    assert torch.allclose(
        modulate(x, shift[:, :1], scale[:, :1], (7,)), x * (1 + scale[:, :1]) + shift[:, :1], atol=1e-6
    )


def test_patches_restore_what_a_convolution_would_embed():
    patch = VideoPatch(4, 6, size=(1, 2, 2))
    latent = torch.randn(2, 4, 3, 4, 6)
    assert torch.allclose(patch.embed(latent), patch.proj(latent).flatten(2).transpose(1, 2), atol=1e-5)
    # Channel last within a token: value of channel c at row p, column q stands at (p * 2 + q) * 4 + c.
    values = torch.arange(16.0).expand(1, 1, 16)
    restored = patch.restore(values, (1, 1, 1))
    assert restored[0, 3, 0, 1, 0] == (1 * 2 + 0) * 4 + 3


def test_sinusoid_is_cosines_then_sines():
    t = torch.tensor([0.0, 750.0])
    table = sinusoid(t, 256)
    i = torch.arange(128, dtype=torch.float64)
    assert torch.allclose(table[1, :128].double(), (750 * 10000 ** (-i / 128)).cos(), atol=1e-6)
    assert torch.equal(table[0, 128:], torch.zeros(128))


def test_every_patch_is_covered_here():
    assert set(PATCHES) == {"audio", "linear", "video"}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m, v, a, s, t: m(None, None, s, t, t), "both are None"),
        (lambda m, v, a, s, t: m(v, a, s, None, t), "video_text"),
        (lambda m, v, a, s, t: m(v[:, :3], a, s, t, t), r"\[B, 4, F, H, W\], got \[2, 3"),
        (lambda m, v, a, s, t: m(v[..., :3], a, s, t, t), "does not divide into patches"),
        (lambda m, v, a, s, t: m(v, a[..., :2], s, t, t), r"\[B, L, 6\], got"),
        (lambda m, v, a, s, t: m(v, a, s, [torch.zeros(9, 8)] * 2, t), "at most"),
        (lambda m, v, a, s, t: m(v, a, s, [torch.zeros(2, 3)] * 2, t), "text encoder"),
    ],
)
def test_bad_inputs_are_named(call, says):
    video, audio, sigma, text, _ = inputs()
    with pytest.raises(OviError, match=says):
        call(twin(), video, audio, sigma, text)


def test_a_model_that_insists_on_other_latents_says_which():
    with pytest.raises(
        OviError, match=r"video_channels 4 where the model expects 48; fps 8 where the model expects 24"
    ):
        twin(expects={"video_channels": 48, "fps": 24, "audio_channels": 6})


def test_heads_must_divide_the_width():
    with pytest.raises(OviError, match="num_heads"):
        twin(tower={"num_heads": 5})
