"""Counts and pitches found against those that were planted."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ovi.data.synthetic import PITCH_BANDS, synthetic_clip
from ovi.errors import OviError
from ovi.metrics.planted import PITCH_CLASSES, PlantedFacts, knock_pitch, pitch_class, semitones

RATE = 16000


def clips(number: int, **knobs):
    geometry = {"fps": 16, "num_frames": 32, "height": 32, "width": 32, "sample_rate": RATE}
    return [synthetic_clip(n, seed=31, **geometry, **knobs) for n in range(number)]


@pytest.mark.parametrize("rate", [16000, 48000])
def test_pitches_are_those_that_were_planted(rate):
    off = []
    for n in range(30):
        made = synthetic_clip(n, seed=31, fps=8, num_frames=16, height=16, width=16, sample_rate=rate)
        off.append(abs(semitones(knock_pitch(made.clip.waveform, rate), made.truth["pitch_hz"])))
    assert max(off) < 0.1


@pytest.mark.parametrize(("level", "most"), [(0.01, 0.2), (0.03, 0.4)])
def test_pitches_in_noise(level, most):
    rng, off = np.random.default_rng(0), []
    for made in clips(20):
        hz = knock_pitch(made.clip.waveform + rng.normal(0, level, 2 * RATE), RATE)
        off.append(abs(semitones(hz, made.truth["pitch_hz"])))
    assert max(off) < most


def test_what_is_no_tone_has_no_pitch():
    rng = np.random.default_rng(0)
    s = np.arange(RATE) / RATE
    burst = np.where(s > 0.5, rng.normal(0, 0.3, RATE) * np.exp(-(s - 0.5).clip(0) / 0.03), 0)
    for sound in (np.zeros(RATE), rng.normal(0, 0.1, RATE), burst):
        assert math.isnan(knock_pitch(sound, RATE))
    with pytest.raises(OviError, match=r"\[N\]"):
        knock_pitch(np.zeros((2, RATE)), RATE)


def test_classes_are_the_bands_that_prompts_name():
    assert list(PITCH_CLASSES) == list(PITCH_BANDS)
    for name, band in PITCH_BANDS.items():
        assert all(pitch_class(hz) == name for hz in np.geomspace(*band, 20))
    assert semitones(440.0, 220.0) == pytest.approx(12)


def test_real_clips_have_all_that_was_planted():
    metric = PlantedFacts(16, RATE)
    for made in clips(24):
        metric.update(made.clip.frames, made.clip.waveform, truth=made.truth)
    figures = {tag: value.item() for tag, value in metric.compute().items()}
    assert figures["planted_count_video"] >= 23 / 24
    assert figures["planted_count_audio"] == figures["planted_pitch_class"] == 1
    assert figures["planted_pitch_semitones"] < 0.05
    assert figures["planted_count_n"] == figures["planted_pitch_n"] == 24
    assert figures["planted_count_coverage"] == figures["planted_pitch_coverage"] == 1


def test_each_fact_is_missed_on_its_own():
    made = next(m for m in clips(40) if m.truth["count"] == 2 and m.truth["pitch"] == "middle")
    metric = PlantedFacts(16, RATE)
    good = {"truth": made.truth}
    metric.update(made.clip.frames, made.clip.waveform, **good)
    metric.update(np.full_like(made.clip.frames, 60), made.clip.waveform, **good)  # nothing seen
    metric.update(made.clip.frames, np.zeros(2 * RATE, np.float32), **good)  # nothing heard
    one_more = np.clip(made.clip.waveform + np.roll(made.clip.waveform, round(0.3 * RATE)), -1, 1)
    metric.update(made.clip.frames, one_more.astype(np.float32), **good)  # heard four times
    wrong = {**made.truth, "pitch": "high", "pitch_hz": 2 * made.truth["pitch_hz"]}
    metric.update(made.clip.frames, made.clip.waveform, truth=wrong)
    metric.update(made.clip.frames, made.clip.waveform)  # no facts
    metric.update(made.clip.frames, made.clip.waveform, truth={**made.truth, "num_balls": 2})
    figures = {tag: value.item() for tag, value in metric.compute().items()}
    assert figures == {
        "planted_count_video": pytest.approx(4 / 5),
        "planted_count_audio": pytest.approx(3 / 5),
        "planted_count_n": 5,
        "planted_count_coverage": pytest.approx(5 / 7),
        "planted_pitch_class": pytest.approx(3 / 4),
        "planted_pitch_semitones": pytest.approx(12 / 4, abs=0.1),
        "planted_pitch_n": 4,
        "planted_pitch_coverage": pytest.approx(4 / 7),
    }


def test_no_facts_no_figures_and_processes_add_up():
    made = clips(4)
    empty = PlantedFacts(16, RATE)
    empty.update(made[0].clip.frames, made[0].clip.waveform)
    assert math.isnan(empty.compute()["planted_count_video"].item())
    assert empty.compute()["planted_count_coverage"].item() == 0
    whole, ranks = PlantedFacts(16, RATE), [PlantedFacts(16, RATE) for _ in range(3)]
    for n, m in enumerate(made):
        for metric in (whole, ranks[n % 2]):
            metric.update(m.clip.frames, m.clip.waveform, truth=m.truth)
    for name, state in whole.metric_state.items():
        assert sum(rank.metric_state[name] for rank in ranks).item() == pytest.approx(state.item())
    with pytest.raises(OviError, match="deep"):
        whole.update(made[0].clip.frames, made[0].clip.waveform, truth={**made[0].truth, "pitch": "deep"})
