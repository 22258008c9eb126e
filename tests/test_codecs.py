"""Video and audio codecs, and the bundle of all three, against scipy, numpy and planted truths."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import fft

from ovi.codecs import AUDIO_CODECS, VIDEO_CODECS, Codecs
from ovi.codecs.dct import BlockDCT, zigzag
from ovi.codecs.logmel import LogMel
from ovi.data.synthetic import synthetic_clip
from ovi.errors import OviError

RATE = 16000
COLOURS = np.array([[1, 1, 1], [-1, 0, 1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small only lose by sharing cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def whole(registry) -> list[str]:
    """Entries that need nothing but defaults."""
    return [name for name in registry if not any(knob.required for knob in registry.knobs(name).values())]


# --- block DCT -------------------------------------------------------------------------------------------------------


def test_zigzag_is_the_order_of_jpeg():
    jpeg = [(0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (0, 3), (1, 2), (2, 1), (3, 0), (4, 0), (3, 1)]
    assert zigzag(8)[:12] == jpeg
    assert zigzag(8)[-2:] == [(7, 6), (7, 7)]


def test_coefficients_are_those_of_scipy():
    codec = BlockDCT(luma_coefficients=6, chroma_coefficients=3)
    video = pixels(2, 3, 2, 16, 24)
    latent = codec.encode(video).numpy()
    assert latent.shape == (2, 12, 2, 2, 3)
    kinds = np.einsum("kc,bcthw->bkthw", COLOURS, video.double().numpy())
    for row in range(2):
        for column in range(3):
            block = kinds[..., row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
            waves = fft.dctn(block, axes=(-2, -1), norm="ortho")
            kept = [waves[:, 0, :, u, v] for u, v in zigzag(8)[:6]]
            kept += [waves[:, kind, :, u, v] for kind in (1, 2) for u, v in zigzag(8)[:3]]
            np.testing.assert_allclose(latent[..., row, column], np.stack(kept, 1), atol=2e-6)


def test_temporal_coefficients_are_those_of_scipy():
    codec = BlockDCT(luma_coefficients=1, chroma_coefficients=1, temporal_stride=4, causal_first_frame=False)
    video = pixels(1, 3, 8, 8, 8)
    latent = codec.encode(video).numpy()[0, :, :, 0, 0].reshape(4, 3, 2)  # temporal frequency, colour, group
    means = np.einsum("kc,cthw->kt", COLOURS, video[0].double().numpy()) / 8  # the orthonormal DC of an 8x8 block
    for group in range(2):
        waves = fft.dct(means[:, 4 * group : 4 * group + 4], axis=1, norm="ortho")
        np.testing.assert_allclose(latent[:, :, group].T, waves, atol=2e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("stride", "kept"), [(1, None), (4, None), (4, 2), (3, 1)])
def test_decoding_is_the_projection_on_what_is_kept(stride, kept, causal):
    codec = BlockDCT(block=4, temporal_stride=stride, temporal_coefficients=kept, causal_first_frame=causal)
    frames = 2 * stride + (1 if codec.causal_first_frame else 0)
    video = pixels(2, 3, frames, 8, 12)
    latent = codec.encode(video)
    decoded = codec.decode(latent)
    assert decoded.shape == video.shape
    torch.testing.assert_close(codec.encode(decoded), latent, atol=3e-6, rtol=0)
    # What is lost is orthogonal to what is kept: no other picture of the same coefficients is closer.
    assert abs(((video - decoded) * decoded).sum() / video.square().sum()) < 1e-5


@pytest.mark.parametrize(("stride", "causal"), [(1, True), (4, False), (4, True)])
def test_all_coefficients_lose_nothing(stride, causal):
    codec = BlockDCT(
        luma_coefficients=64, chroma_coefficients=64, temporal_stride=stride, causal_first_frame=causal
    ).double()
    video = pixels(1, 3, 8 + (codec.causal_first_frame), 16, 8)
    torch.testing.assert_close(codec.decode(codec.encode(video.double())).float(), video, atol=1e-5, rtol=0)


def test_latent_frame_0_of_a_causal_codec_is_pixel_frame_0_alone():
    codec = BlockDCT(temporal_stride=4)
    video = pixels(1, 3, 9, 8, 8)
    other = video.clone()
    other[:, :, 1:] = pixels(1, 3, 8, 8, 8, seed=1)
    first, second = codec.encode(video), codec.encode(other)
    assert torch.equal(first[:, :, 0], second[:, :, 0])
    assert first[:, 12:, 0].abs().max() == 0
    assert not torch.equal(first[:, :, 1], second[:, :, 1])
    # A clip that stands still has the same latent everywhere, so one mean and deviation serve all frames.
    still = codec.encode(video[:, :, :1].expand(-1, -1, 9, -1, -1))
    torch.testing.assert_close(still, still[:, :, :1].expand_as(still), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 1, 5, 8, 8), r"\[B, 3, T, H, W\]"),
        ((3, 5, 8, 8), r"\[B, 3, T, H, W\]"),
        ((1, 3, 5, 12, 8), "12x8.*blocks of 8.*block"),
        ((1, 3, 6, 8, 8), r"6 frames.*4n \+ 1.*num_frames"),
        ((1, 3, 0, 8, 8), r"0 frames.*4n \+ 1"),
    ],
)
def test_pixels_that_do_not_fit_are_named(shape, expected):
    with pytest.raises(OviError, match=expected):
        BlockDCT(temporal_stride=4).encode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({"luma_coefficients": 65}, "luma_coefficients is 65"),
        ({"chroma_coefficients": 0}, "chroma_coefficients is 0"),
        ({"block": 0}, "block must be at least 1"),
        ({"temporal_stride": 4, "temporal_coefficients": 5}, "temporal_coefficients is 5, temporal_stride 4"),
    ],
)
def test_knobs_that_do_not_fit_are_named(knobs, expected):
    with pytest.raises(OviError, match=expected):
        BlockDCT(**knobs)


def test_latents_of_other_channels_are_refused():
    with pytest.raises(OviError, match=r"\[B, 12, F, h, w\], got \[1, 13"):
        BlockDCT().decode_raw(torch.zeros(1, 13, 2, 1, 1))


def test_more_coefficients_make_synthetic_clips_better():
    clip = synthetic_clip(0, seed=0, fps=8, num_frames=8, height=32, width=32, sample_rate=RATE).clip
    video = torch.from_numpy(clip.frames).permute(3, 0, 1, 2)[None] / 127.5 - 1
    psnr = []
    for luma, chroma in ((1, 1), (3, 1), (6, 3), (15, 6), (36, 15)):
        codec = BlockDCT(luma_coefficients=luma, chroma_coefficients=chroma)
        error = (codec.decode(codec.encode(video)) - video).square().mean()
        psnr.append(10 * math.log10(4 / error))
    assert psnr == sorted(psnr)
    assert psnr[2] > 24
    assert psnr[4] > 30


# --- log-mel ---------------------------------------------------------------------------------------------------------


def knock(hz: float, at_s: float, duration_s: float = 1.0, decay_s: float = 0.1) -> np.ndarray:
    since = np.arange(round(duration_s * RATE)) / RATE - at_s
    rise = np.clip(since / 0.001, 0, 1)
    return (0.6 * rise * np.exp(-np.clip(since, 0, None) / decay_s) * np.sin(2 * np.pi * hz * since)).astype(np.float32)


def onset_s(waveform: np.ndarray, near_s: float) -> float:
    """When the 4 ms envelope first exceeds half its peak within 100 ms of ``near_s``."""
    power = np.convolve(waveform.astype(float) ** 2, np.ones(64) / 64, "same")
    begin = round((near_s - 0.1) * RATE)
    envelope = np.sqrt(power[begin : begin + round(0.2 * RATE)])
    return (begin + int(np.argmax(envelope > 0.5 * envelope.max()))) / RATE


def pitch_hz(waveform: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform)), 1 << 17))
    return float(np.argmax(spectrum)) * RATE / (1 << 17)


@pytest.mark.parametrize(
    "knobs", [{}, {"n_fft": 1024}, {"frames_per_token": 4, "mel_bins": 20}, {"frames_per_token": 1, "n_fft": 1024}]
)
def test_an_impulse_lands_in_the_token_whose_span_holds_it(knobs):
    codec = LogMel(**knobs)
    rng = np.random.default_rng(0)
    # Anywhere but within 2 samples of a border, where two tokens have equal rights.
    times = [512 * token + int(rng.integers(2, 510)) for token in (0, 1, 7, 14, 15) for _ in range(8)]
    waves = torch.zeros(len(times), 16 * 512)
    waves[torch.arange(len(times)), times] = 1.0
    frames = codec.encode_raw(waves).unflatten(2, (codec.frames_per_token, -1)).mean(3)
    loudest = frames.flatten(1).argmax(1)
    assert loudest.tolist() == [t // codec.hop for t in times]
    assert (loudest // codec.frames_per_token).tolist() == [t // 512 for t in times]


def test_bands_are_those_of_a_plain_numpy_analysis():
    codec = LogMel(mel_bins=24, min_hz=60.0)
    wave = np.random.default_rng(0).standard_normal(5 * 512 + 100) * 0.1
    latent = codec.encode_raw(torch.from_numpy(wave[None]).float())[0].numpy()
    assert latent.shape == (5, 48)

    def mel(hz):
        return 2595 * np.log10(1 + np.asarray(hz) / 700)

    edges = 700 * (10 ** (np.linspace(mel(60), mel(8000), 26) / 2595) - 1)
    hz = np.arange(257) * RATE / 512
    bank = np.stack([np.interp(hz, edges[m : m + 3], [0, 1, 0], left=0, right=0) for m in range(24)])
    bank /= bank.sum(1, keepdims=True)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(512) / 512)
    padded = np.concatenate([np.zeros(1000), wave, np.zeros(1000)])
    for frame in range(10):
        begin = 1000 + 128 + 256 * frame - 256
        magnitude = np.abs(np.fft.rfft(padded[begin : begin + 512] * window)) * 2 / window.sum()
        expected = np.log(bank @ magnitude + 1e-3)
        np.testing.assert_allclose(latent[frame // 2, frame % 2 * 24 :][:24], expected, atol=2e-3)


def test_a_sine_at_full_scale_reads_0_db():
    hz = 32 * RATE / 512  # on a frequency of the transform
    wave = torch.sin(2 * math.pi * hz * torch.arange(8192) / RATE)[None]
    spectrum = LogMel()._spectrum(wave, 32).abs()
    assert spectrum[0, 32, 8:24].numpy() == pytest.approx(1.0, abs=1e-3)


def test_delaying_by_a_token_moves_the_latent_by_a_token():
    codec, wave = LogMel(), torch.from_numpy(knock(440, 0.2))[None]
    late = torch.nn.functional.pad(wave, (512, 0))
    torch.testing.assert_close(codec.encode_raw(late)[:, 1:31], codec.encode_raw(wave)[:, :30], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("knobs", "worst_ms", "mean_ms", "cents"),
    [({}, 10, 4, 110), ({"mel_bins": 48, "n_fft": 1024}, 12, 5, 110), ({"frames_per_token": 4}, 6, 2.5, 110)],
)
def test_knocks_keep_time_and_pitch(knobs, worst_ms, mean_ms, cents):
    rng = np.random.default_rng(1)
    truths = [(hz, 0.3 + rng.uniform(0, 0.2)) for hz in np.geomspace(160, 1900, 10)]
    waves = np.stack([knock(*truth) for truth in truths])
    codec = LogMel(**knobs)
    back = codec.decode_raw(codec.encode_raw(torch.from_numpy(waves))).numpy()
    assert back.shape == (10, 31 * 512)
    offsets = [abs(onset_s(b, at) - onset_s(w, at)) * 1000 for b, w, (_, at) in zip(back, waves, truths)]
    assert max(offsets) < worst_ms
    assert np.mean(offsets) < mean_ms
    pitches = [1200 * math.log2(pitch_hz(b[round(at * RATE) :][:4800]) / hz) for b, (hz, at) in zip(back, truths)]
    assert np.max(np.abs(pitches)) < cents


def test_decoded_sound_analyses_to_the_latent_it_came_from():
    codec = LogMel()
    latent = codec.encode_raw(torch.from_numpy(np.stack([knock(300, 0.3), knock(1200, 0.4)])))
    again = codec.encode_raw(codec.decode_raw(latent))
    assert (again - latent).abs().mean() < 0.05  # nepers, over a range of 7


def test_decoding_is_deterministic_and_does_not_depend_on_company():
    codec = LogMel(phase_steps=8)
    latent = codec.encode_raw(torch.from_numpy(np.stack([knock(300, 0.3), knock(900, 0.5)])))
    state = torch.get_rng_state()
    both = codec.decode_raw(latent)
    assert torch.equal(both, codec.decode_raw(latent))
    torch.testing.assert_close(both[1:], codec.decode_raw(latent[1:]), atol=1e-5, rtol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_silence_stays_silent():
    codec = LogMel()
    assert codec.decode_raw(codec.encode_raw(torch.zeros(1, 8192))).abs().max() < 1e-6


def test_latents_beyond_any_sound_stay_finite():
    assert LogMel(phase_steps=2).decode_raw(torch.full((1, 8, 64), 1e4)).isfinite().all()


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({"frames_per_token": 3}, "512 samples.*3 frames.*frames_per_token"),
        ({"n_fft": 256}, "n_fft.*twice the hop of 256"),
        ({"mel_bins": 256}, "fewer mel_bins"),
        ({"floor": 0.0}, "floor > 0"),
        ({"mel_bins": 0}, "at least 1"),
    ],
)
def test_audio_knobs_that_do_not_fit_are_named(knobs, expected):
    with pytest.raises(OviError, match=expected):
        LogMel(**knobs)


@pytest.mark.parametrize(
    ("wave", "expected"), [(torch.zeros(1, 511), "511 samples.*one token of 512"), (torch.zeros(1, 2, 600), "mono")]
)
def test_sound_that_does_not_fit_is_named(wave, expected):
    with pytest.raises(OviError, match=expected):
        LogMel().encode(wave)


# --- all codecs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips() -> list[tuple[torch.Tensor, torch.Tensor]]:
    made = [synthetic_clip(n, seed=3, fps=8, num_frames=9, height=32, width=48, sample_rate=RATE) for n in range(4)]
    return [(torch.from_numpy(m.clip.frames), torch.from_numpy(m.clip.waveform)) for m in made]


def specs(video: str = "dct", audio: str = "logmel", text: str = "hashed", **video_knobs) -> dict:
    return {"video": {"name": video, "knobs": video_knobs}, "audio": {"name": audio}, "text": {"name": text}}


@pytest.mark.parametrize("video", whole(VIDEO_CODECS))
@pytest.mark.parametrize("audio", whole(AUDIO_CODECS))
def test_codecs_keep_the_interfaces_promises(video, audio, clips):
    codecs = Codecs.build(specs(video, audio), fps=8)
    assert codecs.fit(clips) == 4
    shapes = codecs.latent_shapes(9, 32, 48)
    latents = [codecs.encode_clip(*clip) for clip in clips]
    for place, kind in enumerate(("video", "audio")):
        stacked = torch.stack([latent[place] for latent in latents])
        assert tuple(stacked.shape[1:]) == shapes[kind]
        values = stacked.movedim(1 if kind == "video" else -1, 0).flatten(1)
        torch.testing.assert_close(values.mean(1), torch.zeros(len(values)), atol=1e-4, rtol=0)
        torch.testing.assert_close(values.std(1, correction=0), torch.ones(len(values)), atol=1e-3, rtol=0)
    frames, waveforms = codecs.decode(*(torch.stack(kind) for kind in zip(*latents)))
    assert frames.shape == (4, 9, 32, 48, 3)
    assert frames.dtype == torch.uint8
    assert waveforms.shape == (4, 18000)
    assert waveforms.abs().max() <= 1


def test_a_codec_that_keeps_everything_gives_the_frames_back(clips):
    codecs = Codecs.build(specs(luma_coefficients=64, chroma_coefficients=64, temporal_stride=4), fps=8)
    codecs.fit(clips)
    video, audio = codecs.encode_clip(*clips[0])
    assert torch.equal(codecs.decode(video[None], audio[None])[0][0], clips[0][0])


def test_a_channel_that_never_changes_is_left_alone():
    codecs = Codecs.build(specs(), fps=8)
    grey = torch.full((8, 16, 16, 3), 90, dtype=torch.uint8)
    codecs.fit([(grey, torch.zeros(16000))])
    video, audio = codecs.encode_clip(grey, torch.zeros(16000))
    assert video.abs().max() < 1e-4
    assert audio.abs().max() < 1e-4


def test_storing_codecs_as_json_is_exact(clips):
    codecs = Codecs.build(specs(temporal_stride=4), fps=8)
    assert not codecs.fitted
    codecs.fit(clips)
    again = Codecs.from_dict(json.loads(json.dumps(codecs.to_dict())))
    assert again.fitted
    assert again.to_dict() == codecs.to_dict()
    assert again.clock == codecs.clock
    for mine, theirs in zip(codecs.encode_clip(*clips[0]), again.encode_clip(*clips[0])):
        assert torch.equal(mine, theirs)


def test_every_knob_is_stored_even_at_its_default():
    stored = Codecs.build(specs(), fps=8).to_dict()
    for kind, registry in (("video", VIDEO_CODECS), ("audio", AUDIO_CODECS)):
        assert set(stored[kind]["knobs"]) == set(registry.knobs(stored[kind]["name"]))


def test_the_clock_follows_from_the_codecs():
    codecs = Codecs.build(specs(temporal_stride=4), fps=24)
    assert codecs.latent_shapes(121, 64, 64) == {"video": (48, 31, 8, 8), "audio": (157, 64)}
    assert codecs.clock.ratio == pytest.approx(0.192)


def test_sound_is_cut_and_padded_to_the_picture(clips):
    codecs = Codecs.build(specs(), fps=8)
    frames, waveform = clips[0]
    exact = codecs.encode_clip(frames, waveform)[1]
    longer = codecs.encode_clip(frames, torch.cat([waveform, torch.ones(9000)]))[1]
    assert torch.equal(exact, longer)
    assert codecs.encode_clip(frames, waveform[:100])[1].shape == exact.shape


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d["clock"].update(video_stride=4), "clock.*video_stride 1 against 4"),
        (lambda d: d["state"]["video"].update(mean=[0.0]), "12 latent channels.*statistics are of 1"),
        (lambda d: d["video"].update(name="dtc"), "Did you mean 'dct'"),
        (lambda d: d["video"]["knobs"].update(blok=8), "no knob blok"),
    ],
)
def test_stored_codecs_that_contradict_themselves_are_refused(change, expected):
    stored = Codecs.build(specs(), fps=8).to_dict()
    change(stored)
    with pytest.raises(OviError, match=expected):
        Codecs.from_dict(stored)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((9, 30, 48), "30x48.*stride of 8.*32 and 48"), ((9, 0, 48), "0x48"), ((0, 32, 32), "0 frames")],
)
def test_sizes_that_do_not_fit_are_named(size, expected):
    with pytest.raises(OviError, match=expected):
        Codecs.build(specs(), fps=8).latent_shapes(*size)


def test_a_clip_shorter_than_an_audio_token_is_refused():
    with pytest.raises(OviError, match="less than one audio token"):
        Codecs.build(specs(), fps=60).latent_shapes(1, 8, 8)


def test_a_missing_codec_is_named():
    with pytest.raises(OviError, match="video, audio, text; got video"):
        Codecs.build({"video": {"name": "dct"}}, fps=8)


def test_frames_of_another_type_are_refused():
    with pytest.raises(OviError, match="uint8"):
        Codecs.build(specs(), fps=8).encode_clip(torch.zeros(8, 16, 16, 3), torch.zeros(16000))
