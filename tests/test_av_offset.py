"""The weight-free offset against shifts that were planted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, shift

from ovi.data.synthetic import synthetic_clip
from ovi.errors import OviError
from ovi.metrics.av_offset import AVOffset, av_offset, motion_changes, sound_rises


def delayed(wave: np.ndarray, late_ms: float, rate: int = 16000) -> np.ndarray:
    """The sound later by so much, silence where none is known."""
    out, by = np.zeros_like(wave), round(late_ms * rate / 1000)
    if by >= 0:
        out[by:] = wave[: len(wave) - by]
    else:
        out[:by] = wave[-by:]
    return out


def measured(number: int, fps: float, size: int, spoil=lambda frames: frames) -> tuple[np.ndarray, np.ndarray]:
    """(errors in ms, confidences) over clips shifted by up to 400 ms."""
    rng = np.random.default_rng(2)
    rows = []
    for n in range(number):
        made = synthetic_clip(
            n, seed=21, fps=fps, num_frames=round(2 * fps), height=size, width=size, sample_rate=16000
        )
        late_ms = rng.uniform(-400, 400)
        found = av_offset(spoil(made.clip.frames), delayed(made.clip.waveform, late_ms), fps=fps, sample_rate=16000)
        rows.append((found.offset_ms - late_ms, found.confidence))
    errors, confidence = np.array(rows).T
    return errors, confidence


@pytest.mark.parametrize(("fps", "size", "bias_ms", "share"), [(24, 64, 3, 0.85), (16, 32, 4, 0.8), (8, 32, 15, 0.6)])
def test_planted_shifts_come_back_with_their_sign(fps, size, bias_ms, share):
    errors, confidence = measured(20, fps, size)
    near = np.abs(errors) < 40
    assert near.mean() >= share
    assert abs(np.median(errors[near])) < bias_ms
    sure = confidence > 0.2
    assert sure.mean() > 0.4
    assert near[sure].mean() >= (0.8 if fps == 8 else 0.9)


def test_noise_and_blur_are_borne():
    def spoil(frames):
        noise = np.random.default_rng(0).normal(0, 6, frames.shape)
        return np.clip(gaussian_filter(frames.astype(float), (0, 1, 1, 0)) + noise, 0, 255).astype(np.uint8)

    errors, confidence = measured(16, 16, 32, spoil)
    sure = confidence > 0.2
    assert sure.mean() > 0.4
    assert (np.abs(errors[sure]) < 40).mean() >= 0.9


def test_a_camera_that_moves_is_borne():
    """A textured scene drifts as a whole and jerks at known times, with a click at each: no object to segment."""
    rng = np.random.default_rng(3)
    texture = gaussian_filter(rng.normal(size=(128, 128)), 2.0)
    texture = 127 + 100 * texture / np.abs(texture).max()
    jerks = (0.5, 1.1, 1.4)
    t = (np.arange(48) + 0.5) / 24
    turns = sum(np.where(t > j, (t - j) * (30 if k % 2 else -30), 0) for k, j in enumerate(jerks)) + 10 * t
    frames = np.stack([shift(texture, (d, 0.3 * d), order=1, mode="wrap")[32:96, 32:96] for d in turns])
    frames = frames.round().astype(np.uint8)[..., None].repeat(3, -1)
    s = np.arange(32000) / 16000
    wave = sum(np.where(s > j, 0.5 * np.exp(-(s - j).clip(0) / 0.02) * np.sin(5000 * (s - j)), 0) for j in jerks)
    for late_ms in (-200, 0, 120):
        found = av_offset(frames, delayed(wave, late_ms), fps=24, sample_rate=16000)
        assert found.offset_ms == pytest.approx(late_ms, abs=10)
        assert found.confidence > 0.2


def camera_pans(frames: np.ndarray, fps: float, number: int, *, textured: bool) -> np.ndarray:
    """The scene within a wider world, seen by a camera that drifts and sways by up to an eighth of the picture."""
    rng = np.random.default_rng(number)
    height = frames.shape[1]
    margin, reach = height * 3 // 8, height // 8
    world = np.pad(frames, ((0, 0), (margin, margin), (margin, margin), (0, 0)), mode="edge").astype(np.float32)
    if textured:
        texture = gaussian_filter(rng.normal(size=world.shape[1:3]), 1.5)
        still = np.abs(world - np.median(world, axis=0)).sum(-1) < 60
        world = world + (25 * texture / np.abs(texture).max() * still)[..., None]
    t = (np.arange(len(frames)) + 0.5) / fps
    sway, phase = rng.uniform(0.2, 0.6, (2, 1)), rng.uniform(0, 2 * np.pi, (2, 1))
    drift = rng.uniform(-0.5, 0.5, (2, 1))
    places = reach * (0.5 * np.sin(2 * np.pi * sway * t + phase) + drift * (t - t.mean()))
    cut = slice(margin - reach, reach - margin)
    seen = [shift(f, (dy, dx, 0), order=1, mode="nearest")[cut, cut] for f, dy, dx in zip(world, *places, strict=True)]
    return np.clip(np.round(seen), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("camera", ["still", "moving", "moving, textured"])
def test_offsets_of_confident_clips_are_within_20_ms(camera):
    """Over new scenes and shifts of up to 400 ms, none further off, with a camera that stands and one that moves."""
    rng = np.random.default_rng(12)
    rows = []
    for n in range(16):
        made = synthetic_clip(n, seed=1234, fps=24, num_frames=48, height=64, width=64, sample_rate=16000)
        frames = made.clip.frames
        if camera != "still":
            frames = camera_pans(frames, 24, n, textured=camera.endswith("textured"))
        late_ms = rng.uniform(-400, 400)
        while not all(0 < at + late_ms / 1000 < 2 for at in made.truth["impacts_s"]):  # else a sound is cut away
            late_ms = rng.uniform(-400, 400)
        found = av_offset(frames, delayed(made.clip.waveform, late_ms), fps=24, sample_rate=16000)
        rows.append((found.offset_ms - late_ms, found.confidence))
    errors, confidence = np.array(rows).T
    sure = confidence >= 0.2
    assert sure.mean() >= 0.6
    assert np.abs(errors[sure] - np.median(errors[sure])).max() < 20
    assert abs(np.median(errors[sure])) < 5  # nor is there a bias to take off first


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 48000])
def test_sound_rises_have_no_constant_bias(rate):
    """The STFT sees an attack early; what is left after calibration is under 3 ms, in noise and in silence."""
    rng, lates = np.random.default_rng(5), []
    for hz in (200.0, 600.0, 1500.0):
        for level in (0.0, 5e-4):
            at = 0.5 + rng.uniform(0, 0.02)
            since = np.arange(rate) / rate - at
            tone = np.where(since > 0, 0.4 * np.sin(2 * np.pi * hz * since) * np.exp(-since.clip(0) / 0.04), 0)
            times_s, rises = sound_rises(tone + rng.normal(0, level or 1e-12, rate), rate)
            smooth = np.convolve(rises, np.hanning(21), mode="same")
            lates.append((times_s[smooth.argmax()] - at) * 1000)
    assert abs(np.mean(lates)) < 3.0
    assert np.abs(lates).max() < 7.0  # one step of the 200 Hz grid and a bit


def test_motion_changes_peak_where_something_turns():
    near = []
    for fps in (16, 24):
        for n in range(6):
            made = synthetic_clip(n, seed=8, fps=fps, num_frames=2 * fps, height=64, width=64, sample_rate=16000)
            times_s, change = motion_changes(made.clip.frames, fps)
            assert times_s == pytest.approx((np.arange(1, 2 * fps - 1) + 0.5) / fps)
            top = times_s[change.argmax()]
            near.append(np.abs(np.array(made.truth["impacts_s"]) - top).min() < 1.01 / fps)
    assert np.mean(near) > 0.9  # the flow may go astray in a picture or two


def test_nothing_seen_or_heard_has_no_offset():
    made = synthetic_clip(0, seed=8, fps=16, num_frames=32, height=32, width=32, sample_rate=16000)
    still = np.full_like(made.clip.frames, 90)
    for frames, wave in ((still, made.clip.waveform), (made.clip.frames, np.zeros(32000, np.float32))):
        found = av_offset(frames, wave, fps=16, sample_rate=16000)
        assert math.isnan(found.offset_ms)
        assert found.confidence == 0


def test_the_metric_counts_what_it_is_sure_of():
    geometry = {"fps": 24, "num_frames": 48, "height": 32, "width": 32, "sample_rate": 16000}
    made = [synthetic_clip(n, seed=21, **geometry) for n in range(6)]
    frames = torch.stack([torch.from_numpy(m.clip.frames) for m in made])
    waves = torch.stack([torch.from_numpy(delayed(m.clip.waveform, 60)) for m in made])
    waves[3] = 0.0
    metric = AVOffset(fps=24, sample_rate=16000)
    for f, w in zip(frames, waves, strict=True):
        metric.update(f, w)
    figures = metric.compute()
    each = [av_offset(f.numpy(), w.numpy(), fps=24, sample_rate=16000) for f, w in zip(frames, waves, strict=True)]
    sure = [abs(o.offset_ms) for o in each if o.confidence >= 0.2]
    assert 3 <= len(sure) <= 5
    assert figures["av_offset_xcorr_ms"].item() == pytest.approx(np.mean(sure))
    assert figures["av_offset_xcorr_ms"].item() == pytest.approx(60, abs=10)
    assert figures["av_offset_xcorr_coverage"].item() == pytest.approx(len(sure) / 6)
    assert figures["av_offset_xcorr_n"].item() == 6
    ranks = [AVOffset(fps=24, sample_rate=16000) for _ in range(3)]
    for k in range(6):
        ranks[k >= 2].update(frames[k], waves[k])
    for name, state in metric.metric_state.items():
        assert torch.allclose(sum(r.metric_state[name] for r in ranks), state)
    silent = AVOffset(fps=24, sample_rate=16000)
    silent.update(frames[0], torch.zeros(32000))
    assert math.isnan(silent.compute()["av_offset_xcorr_ms"].item())
    assert silent.compute()["av_offset_xcorr_coverage"].item() == 0


def test_what_decides_the_figures_is_in_the_identity():
    known = AVOffset(24, 16000).identity()
    assert known == AVOffset(fps=24.0, sample_rate=16000, threshold=0.2, max_lag_s=1.0).identity()
    others = (AVOffset(25, 16000), AVOffset(24, 48000), AVOffset(24, 16000, threshold=0.3))
    assert all(other.identity() != known for other in (*others, AVOffset(24, 16000, max_lag_s=0.5)))


def test_bad_clips_and_knobs_are_refused_in_words():
    metric = AVOffset(24, 16000)
    frames, wave = np.zeros((48, 16, 16, 3), np.uint8), np.zeros(32000, np.float32)
    with pytest.raises(OviError, match="is one of the rates wrong"):
        metric.update(frames, wave[:16000])  # as of a sound at 8 kHz
    with pytest.raises(OviError, match="NaN"):
        metric.update(frames, np.full_like(wave, np.nan))
    with pytest.raises(OviError, match="NaN"):
        metric.update(np.full(frames.shape, np.nan, np.float32), wave)
    assert metric.clips == 0
    for knobs in ({"threshold": -0.1}, {"threshold": 2.0}, {"max_lag_s": 0.0}):
        with pytest.raises(OviError, match=next(iter(knobs))):
            AVOffset(24, 16000, **knobs)


def test_arrays_of_another_shape_are_refused():
    with pytest.raises(OviError, match=r"\[T, H, W, 3\]"):
        av_offset(np.zeros((3, 8, 8, 3), np.uint8), np.zeros(100), fps=8, sample_rate=16000)
    with pytest.raises(OviError, match=r"\[N\]"):
        av_offset(np.zeros((8, 8, 8, 3), np.uint8), np.zeros((2, 100)), fps=8, sample_rate=16000)
