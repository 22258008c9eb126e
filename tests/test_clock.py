"""Lengths and times against the published numbers, brute force over pixel frames, and each other."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovi.clock import Clock
from ovi.errors import OviError

PUBLISHED = Clock()
clocks = st.builds(
    Clock,
    fps=st.sampled_from([8.0, 12.0, 16.0, 23.976, 24.0, 25.0, 30.0]),
    video_stride=st.integers(1, 8),
    causal_first_frame=st.booleans(),
    sample_rate=st.sampled_from([8000, 16000, 24000, 44100]),
    audio_stride=st.sampled_from([256, 512, 1024]),
)


def test_published_lengths():
    assert PUBLISHED.num_latent_frames(121) == 31
    assert PUBLISHED.num_latent_frames(241) == 61
    assert PUBLISHED.num_audio_tokens(80_640) == 157
    assert PUBLISHED.lengths(121) == (31, 157)
    assert PUBLISHED.lengths(241)[1] == 313  # the 314th would end after the clip
    assert PUBLISHED.tokens_per_s == 31.25
    assert PUBLISHED.latent_fps == 6
    assert PUBLISHED.ratio == pytest.approx(0.192, abs=1e-15)
    assert PUBLISHED.duration_s(121) == pytest.approx(5.0416667)


def test_published_factor():
    assert round(PUBLISHED.rope_factor(121), 5) == 0.19676


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("fps", "stride"), [(24.0, 4), (8.0, 2), (25.0, 1), (23.976, 8)])
def test_video_times_are_the_mean_of_their_pixel_frames(fps, stride, causal):
    clock = Clock(fps=fps, video_stride=stride, causal_first_frame=causal)
    num_frames = clock.num_frames(9)
    centres = [(n + 0.5) / fps for n in range(num_frames)]
    groups = [centres[:1]] if causal else []
    rest = centres[len(groups) :]
    groups += [rest[i : i + stride] for i in range(0, len(rest), stride)]
    assert clock.video_times_s(9) == pytest.approx([sum(g) / len(g) for g in groups], abs=1e-12)


def test_audio_times_are_the_mean_of_their_samples():
    expected = [sum((n + 0.5) / 16000 for n in range(512 * j, 512 * (j + 1))) / 512 for j in range(5)]
    assert PUBLISHED.audio_times_s(5) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("num_tokens", "drift_ms"), [(157, 66), (314, 190)])
def test_published_factor_drifts(num_tokens, drift_ms):
    """The last token's position, read as a latent frame's, against the token's own centre: spec/ovi-model.md."""
    position = 0.19676 * (num_tokens - 1)
    below = int(position)
    frames = PUBLISHED.video_times_s(below + 2)
    time_s = frames[below] + (position - below) * (frames[below + 1] - frames[below])
    assert round(1000 * (time_s - PUBLISHED.audio_times_s(num_tokens)[-1])) == pytest.approx(drift_ms, abs=1)


@given(clocks, st.integers(1, 200))
def test_frames_round_trip(clock, num_latent_frames):
    num_frames = clock.num_frames(num_latent_frames)
    assert clock.num_latent_frames(num_frames) == num_latent_frames
    assert len(clock.video_times_s(num_latent_frames)) == num_latent_frames


@given(clocks, st.integers(1, 500))
def test_times_rise_by_the_stride_and_stay_inside_the_clip(clock, num_latent_frames):
    num_frames = clock.num_frames(num_latent_frames)
    num_tokens = clock.num_audio_tokens(clock.num_samples(num_frames))
    for times_s, step_s in (
        (clock.video_times_s(num_latent_frames)[int(clock.causal_first_frame) :], clock.video_stride / clock.fps),
        (clock.audio_times_s(num_tokens), clock.audio_stride / clock.sample_rate),
    ):
        assert all(math.isclose(b - a, step_s, abs_tol=1e-9) for a, b in pairwise(times_s))
        assert all(0 < t < clock.duration_s(num_frames) + 1 / clock.sample_rate for t in times_s)


@given(clocks, st.integers(-3, 100))
def test_frames_that_do_not_fit_name_the_nearest_that_do(clock, num_frames):
    try:
        clock.num_latent_frames(num_frames)
    except OviError as error:
        nearest = int(str(error).rsplit(" ", 1)[1])
        assert clock.num_latent_frames(nearest) >= 1
        others = range(nearest - clock.video_stride, nearest + clock.video_stride + 1, clock.video_stride)
        fitting = [n for n in others if n >= 1]
        assert abs(nearest - num_frames) == min(abs(n - num_frames) for n in fitting)


@pytest.mark.parametrize("knob", ["fps", "video_stride", "sample_rate", "audio_stride"])
@pytest.mark.parametrize("value", [0, -1])
def test_rates_are_positive(knob, value):
    with pytest.raises(OviError, match=f"{knob} must be positive, got {value}"):
        Clock(**{knob: value})


def test_differences_name_what_differs():
    assert PUBLISHED.differences(Clock(**PUBLISHED.to_dict())) == []
    assert PUBLISHED.differences(Clock(fps=24.0 * (1 + 1e-12))) == []
    assert PUBLISHED.differences(Clock(fps=25.0, audio_stride=256)) == [
        "fps 24 against 25",
        "audio_stride 512 against 256",
    ]
