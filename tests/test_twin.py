"""The twin's own properties, over every registered fusion and alignment."""

import copy
import pickle

import pytest
import torch

from ovi.checkpoint import without_storage
from ovi.errors import OviError
from ovi.geometry import MOST_SHAPES
from ovi.layout import LatentLayout
from ovi.lean import modulate
from ovi.patch import PATCHES, VideoPatch, sinusoid
from ovi.rope import ROPE_ALIGNMENTS
from ovi.stream import add_gated
from ovi.tower import pad_text
from small_twins import LAYOUT, inputs, twin


def test_training_may_follow_a_validation_in_inference_mode():
    """Tables that are built once must not be inference tensors, which autograd refuses."""
    model = twin("ovi")
    with torch.inference_mode():
        before = model(*inputs())
    after = model(*inputs())
    after[0].sum().backward()
    assert torch.equal(before[0], after[0])


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


LENGTHS = [(1, 5), (5, 5), (64, 70), (3, 140, 64), (0, 200)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@torch.no_grad()
def test_few_rows_of_padding_stand_for_all(lengths):
    """The attention of zero-padding written out to text_len, as the reference does it."""
    layout = LatentLayout(4, 6, 8, 200, LAYOUT.clock)
    model = twin("ovi", layout=layout)
    video, audio, sigma, _, _ = inputs(len(lengths))
    text = [torch.randn(n, 8) for n in lengths]
    written_out = torch.stack([torch.nn.functional.pad(t, (0, 0, 0, 200 - len(t))) for t in text])
    rows, bias = pad_text(text, 200, 8)
    assert rows.shape[1] == min(200, (max(lengths) // 64 + 1) * 64)
    if bias is not None:  # equal scores: every row, real or standing for others, has its share of 200
        assert torch.allclose(bias.exp().sum(1), torch.tensor(200.0))
    for short, whole in zip(
        model(video, audio, sigma, text, text), model(video, audio, sigma, written_out, written_out)
    ):
        assert (short - whole).abs().max() < 2e-5


@torch.no_grad()
def test_encoded_text_serves_many_passes():
    model = twin("ovi")
    video, audio, sigma, text, _ = inputs()
    encoded = model.encode_text(text, text)
    assert len(encoded[0].keys) == len(model.fusions)
    for level in (sigma, 1 - sigma):
        for once, again in zip(model(video, audio, level, *encoded), model(video, audio, level, text, text)):
            assert torch.equal(once, again)


@torch.no_grad()
def test_perturbed_self_attention_is_its_values():
    """Spatio-temporal guidance: in the named blocks of the named samples each token keeps its own value."""
    model = twin("ovi")
    for p in (b.self_attn.v for tower in (model.video, model.audio) for b in tower.blocks):
        torch.nn.init.zeros_(p.weight)
        torch.nn.init.normal_(p.bias)
    # All values alike: averaging them or keeping one's own is the same.
    for a, b in zip(model(*inputs(), perturb_blocks=[0, 1]), model(*inputs())):
        assert torch.allclose(a, b, atol=1e-5)
    model = twin("ovi")
    plain, every = model(*inputs()), model(*inputs(), perturb_blocks=[0])
    single = model(*inputs(), perturb_blocks=[(), (0,)])
    for p, e, s in zip(plain, every, single):
        assert torch.equal(s[0], p[0])
        assert torch.equal(s[1], e[1])
        assert not torch.allclose(p, e, atol=1e-3)


@torch.no_grad()
def test_an_alignment_exchanged_afterwards_takes_effect():
    model = twin("ovi", alignment="seconds")
    before = model(*inputs())
    model.rope_alignment = model.self_alignment = ROPE_ALIGNMENTS["none"]
    fresh = twin("ovi", alignment="none")
    for a, b, c in zip(model(*inputs()), fresh(*inputs()), before):
        assert torch.equal(a, b)
        assert not torch.allclose(a, c, atol=1e-4)


@torch.no_grad()
def test_tables_of_many_shapes_are_not_kept_for_ever():
    model = twin("ovi")
    for tokens in range(2, 30):
        model(*inputs(tokens=tokens))
    assert len(model._geometries) <= MOST_SHAPES


@torch.no_grad()
def test_copies_and_pickles_are_independent():
    model = twin("ovi")
    model.compile(backend="eager")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for p in other.parameters():
            p.zero_()
        assert not torch.equal(model(*inputs())[0], other(*inputs())[0])


@torch.no_grad()
def test_a_mask_of_text_and_hidden_padding_add_up():
    layout = LatentLayout(4, 6, 8, 70, LAYOUT.clock)
    model = twin("ovi", layout=layout, tower={"mask_text_padding": True})
    everything = torch.ones(2, 70, dtype=torch.bool)
    for a, b in zip(model(*inputs(), text_mask=everything), model(*inputs())):
        assert torch.allclose(a, b, atol=1e-5)


@torch.no_grad()
def test_samples_may_skip_their_own_blocks():
    model = twin("ovi")
    call = inputs(3)
    joined = model(*call, skip_blocks=[(), (0,), (1, 0)], a2v=torch.tensor([1.0, 0.5, 0.0]))
    for i, (skipped, gate) in enumerate([((), 1.0), ((0,), 0.5), ((0, 1), 0.0)]):
        one = [[c[i]] if isinstance(c, list) else c[i : i + 1] for c in call]
        for a, b in zip(joined, model(*one, skip_blocks=skipped, a2v=gate)):
            assert torch.allclose(a[i], b[0], atol=1e-5)


def test_two_segments_equal_a_modulation_per_token():
    x, shift, scale = torch.randn(2, 7, 3), torch.randn(2, 2, 3), torch.randn(2, 2, 3)
    each = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    assert torch.allclose(modulate(x, shift, scale, (3, 4)), x * (1 + scale[:, each]) + shift[:, each], atol=1e-6)
    assert torch.allclose(add_gated(x, -x, scale, (3, 4)), x - x * scale[:, each], atol=1e-6)
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
        (lambda m, v, a, s, t: m(v, a, s, t, t, skip_blocks=[[1]]), "1 entries for a batch of 2"),
        (lambda m, v, a, s, t: m(v, a[:1], s, t, t), "batch sizes differ"),
        (lambda m, v, a, s, t: m(v, a, s[0], t, t), "batch sizes differ"),
        (lambda m, v, a, s, t: m(v, a, s, t[:1], t), "batch sizes differ"),
        (lambda m, v, a, s, t: m(v, a, s, t, t, audio_mask=torch.ones(2, 9)), "audio_mask must be bool"),
        (lambda m, v, a, s, t: m(v, a, s, t, t, audio_mask=torch.ones(2, 8).bool()), "audio_mask must be bool"),
        (
            lambda m, v, a, s, t: m(v, a, s, *m.encode_text(t, t), text_mask=torch.ones(2, 5).bool()),
            "give it to encode_text",
        ),
        (lambda m, v, a, s, t: m(v, a, s, t, t, skip_blocks=[11]), r"skip_blocks names \[11\], .* 0 to 1"),
        (lambda m, v, a, s, t: m(v, a, s, t, t, perturb_blocks=[(0,), (2,)]), r"perturb_blocks names \[0, 2\]"),
        (lambda m, v, a, s, t: m(v, a, s, t, t, text_mask=torch.ones(2, 4).bool()), r"text_mask must be \[2, 5\]"),
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


def test_widths_that_no_rotation_fits_show_when_it_is_built():
    with pytest.raises(OviError, match="a head of 10 dimensions cannot be split"):
        twin(tower={"dim": 20})
    with pytest.raises(OviError, match="a head of 8 dimensions cannot be split"):
        twin(audio_tower={"dim": 16})
    with without_storage():
        assert next(twin(live=False).parameters()).is_meta


def test_blocks_of_unequal_pairs_cannot_be_named():
    model = twin("ovi", tower={"num_blocks": 4}, audio_tower={"num_blocks": 2}, plan="spread:2")
    with pytest.raises(OviError, match=r"unequal number: \[\(3, 1\)\]"):
        model(*inputs(), skip_blocks=[1])
    model(*inputs(), skip_blocks=[0, 2])
