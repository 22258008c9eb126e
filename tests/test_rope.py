"""Positions and rotations against closed forms in float64."""

import math

import pytest
import torch

from ovi.clock import Clock
from ovi.errors import OviError
from ovi.rope import ROPE_ALIGNMENTS, audio_rotation, axis_dims, rotate, video_rotation


def test_published_head_splits_44_42_42():
    assert axis_dims(128) == (44, 42, 42)
    assert axis_dims(32) == (12, 10, 10)


@pytest.mark.parametrize("head_dim", [4, 7])
def test_a_head_that_does_not_split_is_refused(head_dim):
    with pytest.raises(OviError, match="num_heads"):
        axis_dims(head_dim)


def complex_rotation(x, angles):
    """Independent form: adjacent pairs as complex numbers times exp(i angle), float64."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def test_video_rotation_is_time_height_width_with_their_own_frequencies():
    times = torch.tensor([0.3, 1.7, 250.0], dtype=torch.float64)
    x = torch.randn(2, 3, 3 * 2 * 4, 32)
    rotation = video_rotation(times, 2, 4, 32, theta=10000.0, time_axis_only=False)
    dims, angles = (12, 10, 10), torch.zeros(24, 16, dtype=torch.float64)
    for token in range(24):
        f, h, w = token // 8, token // 4 % 2, token % 4
        row = []
        for position, dim in zip((float(times[f]), h, w), dims):
            row += [position * 10000.0 ** (-2 * i / dim) for i in range(dim // 2)]
        angles[token] = torch.tensor(row, dtype=torch.float64)
    assert (rotate(x, rotation) - complex_rotation(x, angles)).abs().max() < 2e-6


def test_audio_turns_its_time_dimensions_and_leaves_the_rest():
    times = torch.arange(5, dtype=torch.float64) * 0.19676
    x = torch.randn(1, 2, 5, 32)
    y = rotate(x, audio_rotation(times, 32, theta=10000.0))
    assert torch.equal(y[..., 12:], x[..., 12:])
    angles = times[:, None] * torch.tensor([10000.0 ** (-2 * i / 12) for i in range(6)], dtype=torch.float64)
    assert (y[..., :12] - complex_rotation(x[..., :12], angles)).abs().max() < 2e-6


def test_time_only_leaves_height_and_width_at_rest():
    rotation = video_rotation(torch.arange(2, dtype=torch.float64), 2, 2, 32, theta=10000.0, time_axis_only=True)
    assert torch.equal(rotation[:, 6:, 1], torch.zeros(8, 10))
    assert rotation[4:, :6, 1].abs().min() > 0


def test_attention_scores_depend_on_time_differences_alone():
    """Moving both clocks by the same time changes no score: the point of a shared clock."""
    q, k = torch.randn(1, 1, 4, 32), torch.randn(1, 1, 6, 32)
    here, there = torch.arange(4, dtype=torch.float64), torch.arange(6, dtype=torch.float64) * 0.6

    def scores(shift):
        rotations = [audio_rotation(t + shift, 32, theta=10000.0) for t in (here, there)]
        return rotate(q, rotations[0]) @ rotate(k, rotations[1]).transpose(-1, -2)

    assert (scores(0.0) - scores(17.25)).abs().max() < 1e-4


CLOCKS = [
    Clock(),
    Clock(fps=12, video_stride=1, causal_first_frame=False),
    Clock(fps=30, sample_rate=48000, audio_stride=960),
]


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("name", list(ROPE_ALIGNMENTS))
def test_every_alignment_gives_ascending_positions_of_the_right_length(name, clock):
    video, audio = ROPE_ALIGNMENTS[name](clock, 7, 20)
    assert video.shape == (7,)
    assert audio.shape == (20,)
    assert video.dtype == audio.dtype == torch.float64
    assert (video.diff() > 0).all()
    assert (audio.diff() > 0).all()


@pytest.mark.parametrize("clock", CLOCKS)
def test_seconds_places_what_happens_together_at_one_position(clock):
    """The pixel frame and the audio samples around any instant have positions less than one token apart."""
    unit = 10.0
    video, audio = ROPE_ALIGNMENTS["seconds"](clock, 30, 150, units_per_s=unit)
    first = 1 if clock.causal_first_frame else clock.video_stride
    for i in range(30):
        begin = 0 if i == 0 else first + (i - 1) * clock.video_stride
        end = first + i * clock.video_stride
        assert float(video[i]) == pytest.approx((begin + end) / 2 / clock.fps * unit)
    for j in (0, 77, 149):
        assert float(audio[j]) == pytest.approx((j + 0.5) * clock.audio_stride / clock.sample_rate * unit)


def test_unaligned_positions_are_indices_and_scaled_ones_are_multiples():
    video, audio = ROPE_ALIGNMENTS["none"](Clock(), 3, 4)
    assert video.tolist() == [0, 1, 2]
    assert audio.tolist() == [0, 1, 2, 3]
    _, audio = ROPE_ALIGNMENTS["scale"](Clock(), 31, 157)
    assert float(audio[156]) == pytest.approx(156 * 0.19676)
    _, audio = ROPE_ALIGNMENTS["ratio"](Clock(), 31, 157)
    assert float(audio[156]) == pytest.approx(156 * 0.192)
    video, audio = ROPE_ALIGNMENTS["ratio_audio"](Clock(), 31, 157)
    assert float(video[30]) == pytest.approx(30 / 0.192)
    assert float(audio[156]) == 156
    # Counted as one pixel frame of four, the first latent frame brings all later ones three pixel frames forward.
    video, _ = ROPE_ALIGNMENTS["ratio_audio"](Clock(), 31, 157, first_frame=True)
    assert float(video[0]) == 0
    assert float(video[30]) == pytest.approx((30 - 3 / 4) / 0.192)
    assert math.isclose(Clock().rope_factor(121), 0.19676, abs_tol=5e-6)
