"""AV-Align against peaks that were planted, intersections counted by hand, and librosa's onsets."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, shift

from ovi.data.synthetic import synthetic_clip
from ovi.errors import OviError
from ovi.metrics.av_align import AVAlign, av_align, motion_peaks, peak_overlap, sound_onsets
from ovi.metrics.averaged import averaged
from ovi.metrics.optical_flow import dense_flow, grey, mean_flow

RATE = 16000


@pytest.mark.parametrize(
    ("seen", "heard", "within", "expected"),
    [
        ([0.5], [0.5], 0.04, 1.0),
        ([0.5], [0.54], 0.04, 1.0),  # the very edge counts
        ([0.5], [0.55], 0.04, 0.0),
        ([0.2, 1.0, 1.5], [0.21, 1.52], 0.04, 2 / 3),
        ([0.5], [0.48, 0.5, 0.52], 0.04, 1 / 3),  # one peak is hit once, where the published count gives 3 / 1
        ([0.1, 0.16], [0.13, 0.2], 0.04, 1.0),  # greedy by nearness would pair 0.16 with 0.13 or leave one over
        ([0.1, 0.2, 0.3], [1.0], 0.04, 0.0),
    ],
)
def test_overlap_by_hand(seen, heard, within, expected):
    assert peak_overlap(np.array(seen), np.array(heard), within) == pytest.approx(expected)


def test_no_peaks_no_figure():
    one, none = np.array([0.5]), np.zeros(0)
    assert all(math.isnan(peak_overlap(a, b, 0.04)) for a, b in ((none, one), (one, none), (none, none)))


def test_overlap_is_the_best_matching_there_is():
    """Against every one-to-one matching of small sets, tried out."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        seen, heard = np.sort(rng.uniform(0, 0.4, 4)), np.sort(rng.uniform(0, 0.4, 3))
        most = max(
            sum(abs(seen[i] - heard[j]) <= 0.05 for j, i in enumerate(order))
            for order in itertools.permutations(range(4), 3)
        )
        assert peak_overlap(seen, heard, 0.05) == pytest.approx(most / (7 - most))


def moving(speeds: np.ndarray) -> np.ndarray:
    """A textured picture that moves so many pixels from each frame to the next."""
    texture = gaussian_filter(np.random.default_rng(1).normal(size=(64, 64)), 2.0, mode="wrap")
    texture = 127 + 110 * texture / np.abs(texture).max()
    places = np.concatenate([[0.0], np.cumsum(speeds)])
    frames = np.stack([shift(texture, (0.6 * p, 0.8 * p), order=3, mode="grid-wrap") for p in places])
    return np.clip(frames.round(), 0, 255).astype(np.uint8)[..., None].repeat(3, -1)


@pytest.mark.parametrize("block", [1, 2, 5, 300])
def test_averages_are_means_over_squares(block):
    frames = np.random.default_rng(0).integers(0, 256, (2, 2 * block + 1, 3 * block, 3)).astype(np.uint8)
    found = averaged(frames, block)
    assert found.shape == (2, 3 if block == 1 else 2, 3, 3)
    for row, column in ((0, 0), (1, 2)):
        cut = frames[:, row * block : (row + 1) * block, column * block : (column + 1) * block]
        assert found[:, row, column] == pytest.approx(cut.astype(float).mean((1, 2)), abs=2e-3)


def test_flow_is_the_motion_that_was_made():
    first, second = grey(moving(np.array([2.0])))
    flow = dense_flow(first, second)[:, 8:-8, 8:-8]
    assert np.median(flow, (1, 2)) == pytest.approx((1.2, 1.6), abs=0.03)
    assert mean_flow(first, second) == pytest.approx((1.2, 1.6), abs=0.3)  # edges of the picture come in
    assert not mean_flow(first, first).any()


def test_peaks_of_motion_are_where_it_is_fastest():
    at = np.array([6, 15, 22])
    speeds = 0.2 + sum(1.5 * np.exp(-0.5 * ((np.arange(30) - a) / 1.2) ** 2) for a in at)
    # Speed number n is from frame n to the next: the instant (n + 1) / fps.
    assert motion_peaks(moving(speeds), 25.0) == pytest.approx((at + 1) / 25.0)
    assert not len(motion_peaks(moving(speeds), 25.0, least_motion=1.0))
    assert not len(motion_peaks(moving(np.zeros(10)), 25.0))


@pytest.mark.parametrize("rate", [16000, 48000])
def test_onsets_are_where_knocks_begin(rate):
    errors, counts = [], []
    for n in range(12):
        made = synthetic_clip(n, seed=5, fps=8, num_frames=16, height=16, width=16, sample_rate=rate)
        found, planted = sound_onsets(made.clip.waveform, rate), np.array(made.truth["impacts_s"])
        counts.append(len(found) == len(planted))
        if counts[-1]:
            errors += list(np.abs(found - planted))
    assert np.mean(counts) >= 0.9
    assert max(errors) < 0.008


def test_librosa_hears_the_same_onsets():
    librosa = pytest.importorskip("librosa")
    for n in range(6):
        made = synthetic_clip(n, seed=9, fps=8, num_frames=16, height=16, width=16, sample_rate=22050)
        theirs = librosa.onset.onset_detect(y=made.clip.waveform, sr=22050, units="time")
        theirs = theirs[theirs > 0.1]  # where its first whole window begins, it hears the background begin
        assert sound_onsets(made.clip.waveform, 22050) == pytest.approx(theirs, abs=0.03)  # a hop of theirs is 23 ms


def test_silence_and_hiss_have_no_onset():
    assert not len(sound_onsets(np.zeros(RATE), RATE))
    assert not len(sound_onsets(np.random.default_rng(0).normal(0, 1e-4, RATE), RATE))


def test_clicks_at_the_peaks_hit_and_clicks_between_them_do_not():
    at = np.array([6, 15, 24])
    frames = moving(0.2 + sum(1.5 * np.exp(-0.5 * ((np.arange(30) - a) / 1.2) ** 2) for a in at))

    def clicks(times_s):
        s = np.arange(round(31 / 25 * RATE)) / RATE
        return sum(
            np.where(s > t, 0.5 * np.exp(-(s - t).clip(0) / 0.02) * np.sin(5000 * (s - t)), 0) for t in times_s
        ).astype(np.float32)

    times = (at + 1) / 25.0
    figure = {late: av_align(frames, clicks(times + late), fps=25, sample_rate=RATE) for late in (0.0, 0.03, 0.09)}
    assert figure == {0.0: 1.0, 0.03: 1.0, 0.09: 0.0}
    assert av_align(frames, clicks(times[:2]), fps=25, sample_rate=RATE) == pytest.approx(2 / 3)
    assert av_align(frames, clicks([*times, 0.5, 0.85]), fps=25, sample_rate=RATE) == pytest.approx(3 / 5)


def test_the_metric_is_the_mean_over_clips_that_have_both():
    made = [synthetic_clip(n, seed=5, fps=24, num_frames=48, height=32, width=32, sample_rate=RATE) for n in range(4)]
    each = [av_align(m.clip.frames, m.clip.waveform, fps=24, sample_rate=RATE) for m in made]
    metric, halves = AVAlign(24, RATE), [AVAlign(24, RATE) for _ in range(3)]
    for n, m in enumerate(made):
        metric.update(m.clip.frames, m.clip.waveform)
        halves[n % 2].update(m.clip.frames, m.clip.waveform)
    metric.update(made[0].clip.frames, np.zeros(2 * RATE, np.float32))
    metric.update(np.full_like(made[0].clip.frames, 90), made[0].clip.waveform)
    figures = {tag: value.item() for tag, value in metric.compute().items()}
    assert figures == {
        "av_align_iou": pytest.approx(np.mean(each)),
        "av_align_iou_n": 4,
        "av_align_iou_coverage": pytest.approx(4 / 6),
    }
    for half in halves[1:]:
        for name in ("total", "covered", "clips"):
            getattr(halves[0], name).add_(getattr(half, name))
    assert halves[0].compute()["av_align_iou"].item() == pytest.approx(np.mean(each))
    still = AVAlign(24, RATE)
    still.update(np.full_like(made[0].clip.frames, 90), made[0].clip.waveform)
    assert math.isnan(still.compute()["av_align_iou"].item())


def test_bad_input_and_knobs_are_refused():
    frames = np.zeros((24, 16, 16, 3), np.uint8)
    with pytest.raises(OviError, match=r"\[T, H, W, 3\]"):
        motion_peaks(frames[0], 24)
    with pytest.raises(OviError, match=r"\[N\]"):
        sound_onsets(np.zeros((2, 100)), RATE)
    with pytest.raises(OviError, match="least_motion"):
        AVAlign(24, RATE, least_motion=-1.0)
    metric = AVAlign(24, RATE)
    with pytest.raises(OviError, match="is one of the rates wrong"):
        metric.update(frames, np.zeros(RATE // 2, np.float32))
    with pytest.raises(OviError, match="NaN"):
        metric.update(frames, np.full(RATE, np.nan, np.float32))
    assert AVAlign(24, RATE, least_motion=0.01).identity() != metric.identity()
