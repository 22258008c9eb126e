"""The exact figure for synthetic clips: its floor, its chance level, and pictures as bad as a model makes them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn
from scipy.ndimage import gaussian_filter

from ovi.data.media import read_clip, write_clip
from ovi.data.synthetic import render, sample_scene, synthetic_clip
from ovi.errors import OviError
from ovi.metrics.impacts import MeanImpactOffset, audio_onsets, impact_offset, track, video_impacts


def clips(number: int, *, fps: float, size: int, seconds: int = 2, **knobs):
    geometry = {"fps": fps, "num_frames": round(seconds * fps), "height": size, "width": size, "sample_rate": 16000}
    return [synthetic_clip(n, seed=11, **geometry, **knobs) for n in range(number)]


def as_is(frames: np.ndarray) -> np.ndarray:
    return frames


def blurred_and_noisy(frames: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 6, frames.shape)
    return np.clip(gaussian_filter(frames.astype(float), (0, 1, 1, 0)) + noise, 0, 255).round().astype(np.uint8)


def four_coefficients(frames: np.ndarray) -> np.ndarray:
    """The four lowest DCT coefficients of every 8x8 block: what the synthetic proof's video codec keeps."""
    t, h, w, _ = frames.shape
    blocks = frames.astype(float).reshape(t, h // 8, 8, w // 8, 8, 3)
    kept = np.zeros((8, 1, 8, 1))
    kept[:2, :, :2] = 1
    low = idctn(dctn(blocks, axes=(2, 4), norm="ortho") * kept, axes=(2, 4), norm="ortho")
    return np.clip(low.reshape(frames.shape), 0, 255).round().astype(np.uint8)


@pytest.mark.parametrize("spoil", [as_is, blurred_and_noisy, four_coefficients])
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("fps", [8, 12, 16, 24])
def test_impacts_are_found_where_they_are(fps, size, spoil):
    errors, wrong = [], 0
    for made in clips(8, fps=fps, size=size):
        found, planted = video_impacts(spoil(made.clip.frames), fps), np.array(made.truth["impacts_s"])
        if len(found) != len(planted):
            wrong += 1
            continue
        errors += list(np.abs(found - planted) * 1000)
    assert wrong <= 1
    assert np.mean(errors) < (6.0 if spoil is four_coefficients else 2.0)


@pytest.mark.parametrize("wobble_px", [0.5, 1.0])
def test_a_wobbling_object_still_bounces_where_it_does(wobble_px):
    rng, errors, wrong = np.random.default_rng(4), [], 0
    for made in clips(16, fps=16, size=64):
        shifts = np.round(rng.normal(0, wobble_px, len(made.clip.frames))).astype(int)
        rolled = np.stack([np.roll(f, s, 0) for f, s in zip(made.clip.frames, shifts, strict=True)])
        # Put the still background back where the roll dragged it along.
        still = np.median(made.clip.frames, axis=0)
        moved = np.abs(rolled - np.stack([np.roll(still, s, 0) for s in shifts])).sum(-1, keepdims=True) > 60
        frames = np.where(moved, rolled, still).astype(np.uint8)
        found, planted = video_impacts(frames, 16), np.array(made.truth["impacts_s"])
        wrong += len(found) != len(planted)
        errors += [np.abs(planted - f).min() * 1000 for f in found]
    assert wrong <= 2
    assert np.mean(errors) < 15


def test_the_object_is_followed():
    """The tracked centre against the scene's equation of motion."""
    times = (np.arange(32) + 0.5) / 16
    for seed in range(8):
        scene = sample_scene(np.random.default_rng(seed), duration_s=2.0, margin_s=0.125)
        ball = scene.balls[0]
        clip = render(scene, fps=16, num_frames=32, height=64, width=64, sample_rate=16000)
        times_s, heights, _ = track(clip.frames, 16)
        assert times_s == pytest.approx(times)
        assert np.abs(heights - (scene.floor_height + ball.heights(times) + ball.radius)).max() < 0.5 / 64


def test_large_pictures_are_followed_as_well():
    """Averaged down, of a size that squares do not fill, the object is where it is and the impacts are the same."""
    scene = sample_scene(np.random.default_rng(3), duration_s=2.0, margin_s=0.125)
    ball, times = scene.balls[0], (np.arange(32) + 0.5) / 16
    clip = render(scene, fps=16, num_frames=32, height=387, width=515, sample_rate=16000)
    _, heights, _ = track(clip.frames, 16)
    radius = ball.radius  # in the smaller side, which is the height
    assert np.abs(heights - (scene.floor_height + ball.heights(times) + radius)).max() < 0.5 / 128
    assert video_impacts(clip.frames, 16) == pytest.approx(scene.impacts_s, abs=0.003)


def test_pictures_without_a_bounce_have_no_impact():
    still = np.full((32, 32, 32, 3), 60, np.uint8)
    assert len(video_impacts(still, 16)) == 0
    noise = np.random.default_rng(0).integers(50, 70, still.shape).astype(np.uint8)
    assert len(video_impacts(noise, 16)) == 0
    rows, columns = np.mgrid[:64, :64]
    for path in (lambda n: 50 - 1.2 * n, lambda n: 32 + 16 * np.cos(2 * np.pi * n / 32), lambda n: 8 + 0.045 * n * n):
        gliding = (
            np.stack([np.where(np.hypot(rows - path(n), columns - 10 - n)[..., None] < 6, 220, 40) for n in range(32)])
            .astype(np.uint8)
            .repeat(3, -1)
        )
        assert len(video_impacts(gliding, 16)) == 0, "a glide, a swing or a fall is no impact"


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_onsets_are_found_to_a_few_ms(rate):
    rng = np.random.default_rng(1)
    for hz in (150.0, 500.0, 2000.0):
        planted = np.cumsum(rng.uniform(0.25, 0.5, 4))
        t = np.arange(round(2.4 * rate)) / rate
        wave = rng.normal(0, 1e-3, len(t))
        for at, level in zip(planted, (0.8, 0.3, 0.5, 0.2), strict=True):
            since = t - at
            wave += np.where(since > 0, level * np.sin(2 * np.pi * hz * since) * np.exp(-since.clip(0) / 0.035), 0)
        found = audio_onsets(wave.astype(np.float32), rate)
        assert len(found) == 4
        assert np.abs(found - planted).max() < 0.003


def test_sound_without_attacks_has_no_onset():
    t = np.arange(32000) / 16000
    assert len(audio_onsets(np.zeros(32000, np.float32), 16000)) == 0
    assert len(audio_onsets(np.random.default_rng(0).normal(0, 0.1, 32000), 16000)) == 0
    assert len(audio_onsets(0.5 * np.sin(2 * np.pi * 200 * t), 16000)) == 0
    swell = np.sin(np.pi * t / 2) ** 2 * np.sin(2 * np.pi * 300 * t)
    assert len(audio_onsets(swell, 16000)) == 0


@pytest.mark.parametrize("fps", [8, 16, 24])
def test_floor_and_chance_through_a_file(tmp_path, fps):
    """Through H.264 and AAC the true pairs lie within 15 ms, and pairs of different clips beyond 120 ms."""
    own, other, previous = [], [], None
    for n, made in enumerate(clips(16, fps=fps, size=64)):
        path = tmp_path / f"{n}.mp4"
        write_clip(path, made.clip)
        clip = read_clip(path, fps=fps, num_frames=2 * fps, height=64, width=64, sample_rate=16000)
        own.append(impact_offset(clip.frames, clip.waveform, fps=fps, sample_rate=16000))
        if previous is not None:
            other.append(impact_offset(clip.frames, previous, fps=fps, sample_rate=16000))
        previous = clip.waveform
    assert all(o.num_matched for o in own)
    assert np.mean([o.mean_abs_ms for o in own]) < 5.0
    assert np.mean([o.num_impacts == o.num_onsets for o in own]) > 0.9
    assert np.mean([o.mean_abs_ms for o in other]) > 120.0


@pytest.mark.parametrize("late_ms", [-80, -20, 30, 90])
def test_a_shift_of_the_sound_comes_out_with_its_sign(late_ms):
    for made in clips(5, fps=16, size=64):
        wave = np.roll(made.clip.waveform, late_ms * 16)
        found = impact_offset(made.clip.frames, wave, fps=16, sample_rate=16000)
        assert found.signed_ms == pytest.approx(late_ms, abs=3.0)
        assert found.mean_abs_ms == pytest.approx(abs(late_ms), abs=3.0)


def test_matching_is_one_to_one():
    made = next(c for c in clips(40, fps=16, size=64) if c.truth["count"] == 3)
    begin, end = (round((made.truth["impacts_s"][1] + d) * 16000) for d in (-0.05, 0.3))
    wave = made.clip.waveform.copy()
    wave[begin:end] = wave[:1].repeat(end - begin) * 0
    found = impact_offset(made.clip.frames, wave, fps=16, sample_rate=16000)
    assert (found.num_impacts, found.num_onsets, found.num_matched) == (3, 2, 2)
    assert found.mean_abs_ms < 5
    silent = impact_offset(made.clip.frames, np.zeros(32000, np.float32), fps=16, sample_rate=16000)
    assert math.isnan(silent.mean_abs_ms)
    assert (silent.num_matched, silent.num_impacts, silent.num_onsets) == (0, 3, 0)


def test_the_metric_is_the_mean_over_clips_and_merges_exactly():
    made = clips(6, fps=16, size=32)
    frames = torch.stack([torch.from_numpy(m.clip.frames) for m in made])
    waves = torch.stack([torch.from_numpy(np.roll(m.clip.waveform, 16 * 40)) for m in made])
    waves[2] = 0.0  # one silent clip: found in the picture only
    metric = MeanImpactOffset(fps=16, sample_rate=16000)
    for f, w in zip(frames, waves, strict=True):
        metric.update(f, w)
    figures = metric.compute()
    assert figures["impact_offset_ms"].item() == pytest.approx(40, abs=3)
    assert figures["impact_offset_coverage"].item() == pytest.approx(5 / 6)
    assert figures["impact_offset_match_rate"].item() == pytest.approx(5 / 6)
    assert figures["impact_offset_n"].item() == 6
    # As two ranks and one that saw nothing: states add up.
    ranks = [MeanImpactOffset(fps=16, sample_rate=16000) for _ in range(3)]
    for k in range(6):
        ranks[k >= 4].update(frames[k], waves[k])
    for name, state in metric.metric_state.items():
        assert metric._reductions[name] is not None
        assert torch.allclose(sum(r.metric_state[name] for r in ranks), state)
    empty = MeanImpactOffset(fps=16, sample_rate=16000)
    empty.update(frames[0], torch.zeros(32000))
    assert math.isnan(empty.compute()["impact_offset_ms"].item())
    assert empty.compute()["impact_offset_coverage"].item() == 0


def test_arrays_of_another_shape_are_refused():
    with pytest.raises(OviError, match=r"\[T, H, W, 3\]"):
        video_impacts(np.zeros((3, 32, 32), np.uint8), 16)
    with pytest.raises(OviError, match=r"\[N\]"):
        audio_onsets(np.zeros((2, 100), np.float32), 16000)
