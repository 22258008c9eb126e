"""Weight-free metrics on real footage: music over animation, where nothing that is seen is heard."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from ovi.data.media import Clip, read_clip
from ovi.errors import OviError
from ovi.metrics.av_align import AVAlign, motion_peaks, sound_onsets
from ovi.metrics.av_offset import AVOffset, av_offset, motion_changes
from ovi.metrics.impacts import MeanImpactOffset
from ovi.metrics.planted import PlantedFacts

FORM = {"fps": 25.0, "num_frames": 125, "height": 90, "width": 160, "sample_rate": 16000}


@pytest.fixture(scope="module")
def bunny(real_clip: Path) -> Clip:
    return read_clip(real_clip, **FORM)


def clicked(clip: Clip, times_s: np.ndarray) -> np.ndarray:
    """The clip's own sound, far softer, and a click at each time."""
    s = np.arange(len(clip.waveform)) / clip.sample_rate
    click = sum(
        np.where(s > t, np.exp(-(s - t).clip(0) / 0.01) * np.sin(2 * np.pi * 1500 * (s - t)), 0) for t in times_s
    )
    return (0.02 * clip.waveform + 0.5 * click).astype(np.float32)


def test_music_is_out_of_step_and_the_coverage_says_so(bunny):
    metric = AVOffset(25, 16000)
    metric.update(bunny.frames, bunny.waveform)
    figures = {tag: value.item() for tag, value in metric.compute().items()}
    assert math.isnan(figures["av_offset_xcorr_ms"])
    assert figures["av_offset_xcorr_coverage"] == 0
    assert figures["av_offset_xcorr_n"] == 1


def test_noise_has_no_offset_more_often_than_not(bunny):
    rng = np.random.default_rng(0)
    found = [
        av_offset(bunny.frames[:50], rng.normal(0, 0.1, 32000), fps=25, sample_rate=16000).confidence for _ in range(6)
    ]
    assert np.median(found) < 0.2
    assert max(found) < 0.4


def test_clicks_where_the_footage_jerks_are_found_wherever_they_are_shifted(bunny):
    """The footage's own three strongest changes of motion, made audible: a real picture with a known offset.

    Animated motion is soft, and the confidence stays low (0.1 to 0.15); the offset is right all the same.
    """
    times_s, change = motion_changes(bunny.frames, 25)
    strongest: list[float] = []
    for n in np.argsort(change)[::-1]:
        if 0.6 < times_s[n] < 4.4 and all(abs(times_s[n] - t) > 0.3 for t in strongest):
            strongest.append(float(times_s[n]))
        if len(strongest) == 3:
            break
    for late_ms in (-300, 0, 200):
        wave = clicked(bunny, np.array(strongest) + late_ms / 1000)
        found = av_offset(bunny.frames, wave, fps=25, sample_rate=16000)
        assert found.offset_ms == pytest.approx(late_ms, abs=25)
        assert found.confidence > 0.05


def test_onsets_move_with_the_sound_and_motion_stays(bunny):
    seen, heard = motion_peaks(bunny.frames, 25), sound_onsets(bunny.waveform, 16000)
    assert len(seen) > 5
    assert len(heard) > 2
    by = 0.35  # a whole number of steps of the 200 Hz grid, so that windows fall alike
    later = np.concatenate([np.zeros(round(by * 16000), np.float32), bunny.waveform])[: len(bunny.waveform)]
    moved = sound_onsets(later, 16000)
    expected = heard[(heard > 0.2) & (heard < 4.4)] + by
    assert all(np.abs(moved - t).min() < 0.006 for t in expected)
    assert np.array_equal(motion_peaks(bunny.frames, 25), seen)


def test_clicks_at_the_peaks_of_motion_align(bunny):
    seen = motion_peaks(bunny.frames, 25)
    apart = [float(seen[0])]
    for t in seen[1:]:
        if t - apart[-1] > 0.2:
            apart.append(float(t))
    metric, chance = AVAlign(25, 16000), AVAlign(25, 16000)
    metric.update(bunny.frames, clicked(bunny, np.array(apart)))
    chance.update(bunny.frames, bunny.waveform)
    figure = metric.compute()["av_align_iou"].item()
    assert figure == pytest.approx(len(apart) / len(seen), abs=0.12)
    assert figure > 1.5 * chance.compute()["av_align_iou"].item()


@pytest.mark.parametrize("kind", [AVOffset, AVAlign, MeanImpactOffset, PlantedFacts])
def test_the_same_file_twice_is_the_same_figure(bunny, real_clip, kind):
    figures = []
    for clip in (bunny, read_clip(real_clip, **FORM)):
        metric = kind(25, 16000)
        metric.update(clip.frames[:60], clip.waveform[:38400])
        figures.append({tag: value.item() for tag, value in metric.compute().items()})
    assert str(figures[0]) == str(figures[1])  # NaN by name


@pytest.mark.parametrize("kind", [AVOffset, AVAlign, MeanImpactOffset, PlantedFacts])
def test_a_wrong_rate_is_noticed(bunny, kind):
    for fps, rate in ((25, 48000), (30, 16000), (24, 22050)):
        metric = kind(fps, rate)
        with pytest.raises(OviError, match="is one of the rates wrong"):
            metric.update(bunny.frames, bunny.waveform)
        assert metric.clips == 0
