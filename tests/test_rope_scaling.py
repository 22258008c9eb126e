"""Scalings of the time axis against forms written in numpy."""

import numpy as np
import pytest
import torch

from ovi.errors import OviError
from ovi.rope import audio_rotation, axis_dims, video_rotation
from ovi.rope_scaling import ROPE_SCALINGS, ntk, yarn
from small_twins import inputs, twin

THETA, D = 10000.0, 64
POSITIONS = np.array([0.0, 0.5, 7.25, 61.0])


def frequencies(theta=THETA):
    dim = axis_dims(D)[0]
    return np.array([theta ** (-2 * i / dim) for i in range(dim // 2)])


def numpy_angles(name, f):
    dim = axis_dims(D)[0]
    if name == "identity":
        return np.outer(POSITIONS, frequencies()), 1.0
    if name == "interpolate":
        return np.outer(POSITIONS / f, frequencies()), 1.0
    if name == "ntk":
        return np.outer(POSITIONS, frequencies(THETA * f ** (dim / (dim - 2)))), 1.0
    # YaRN as its paper has it, in wavelengths: r = L / lambda, ramp gamma between alpha = 1 and beta = 32.
    wavelength = 2 * np.pi / frequencies()
    r = 31.0 / wavelength
    gamma = np.where(r < 1, 0, np.where(r > 32, 1, (r - 1) / 31))
    return np.outer(POSITIONS, (1 - gamma) * frequencies() / f + gamma * frequencies()), 0.1 * np.log(f) + 1


def scaling(name, factor):
    entry = ROPE_SCALINGS[name]
    return entry if name == "identity" else lambda p, q, t: entry(p, q, t, factor=factor)


@pytest.mark.parametrize("factor", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("name", list(ROPE_SCALINGS))
def test_tables_are_those_of_the_formula(name, factor):
    angles, magnitude = numpy_angles(name, factor)
    audio = audio_rotation(torch.from_numpy(POSITIONS), D, theta=THETA, scaling=scaling(name, factor))
    pairs = axis_dims(D)[0] // 2
    np.testing.assert_allclose(audio[:, :pairs, 0], magnitude * np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(audio[:, :pairs, 1], magnitude * np.sin(angles), atol=1e-6)
    np.testing.assert_allclose(audio[:, pairs:, 0], magnitude, atol=1e-6)  # at rest, under the same temperature


@pytest.mark.parametrize("name", list(ROPE_SCALINGS))
def test_height_and_width_keep_their_frequencies(name):
    positions = torch.from_numpy(POSITIONS)
    plain = video_rotation(positions, 2, 3, D, theta=THETA, time_axis_only=False)
    scaled = video_rotation(positions, 2, 3, D, theta=THETA, time_axis_only=False, scaling=scaling(name, 2.0))
    pairs = axis_dims(D)[0] // 2
    magnitude = 0.1 * np.log(2) + 1 if name == "yarn" else 1.0
    assert torch.allclose(scaled[:, pairs:], magnitude * plain[:, pairs:], atol=1e-6)


def test_ntk_keeps_the_fastest_pair_and_interpolates_the_slowest():
    q = torch.from_numpy(frequencies())
    _, changed, _ = ntk(torch.zeros(1), q, THETA, factor=4.0)
    assert changed[0].item() == pytest.approx(1)
    assert (q[-1] / changed[-1]).item() == pytest.approx(4)


@torch.no_grad()
def test_a_twin_with_positions_interpolated_sees_a_long_clip_as_a_short_one():
    """Twice the tokens at half the distance: the rotations of every second token are those of the short clip."""
    short, long = twin("ovi"), twin("ovi", rope_scaling=scaling("interpolate", 2.0))
    video, audio, *_ = inputs(frames=4, tokens=8)
    long_video, long_audio, *_ = inputs(frames=8, tokens=16)
    a, b = short._geometry(video, audio), long._geometry(long_video, long_audio)
    # Centres of tokens: (j + 0.5) / rate; token 2j + 1/2 of the long clip does not exist, so compare differences.
    angle = [torch.atan2(t[..., 1], t[..., 0]) for t in (a.own[1], b.own[1])]
    step = [(x[1:, 5] - x[:-1, 5]) for x in angle]
    assert torch.allclose(step[1], step[0][0] / 2 * torch.ones_like(step[1]), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ntk(torch.zeros(1), torch.ones(4), THETA, factor=0.5), "at least 1; got 0.5"),
        (lambda: yarn(torch.zeros(1), torch.ones(4), THETA, fast=1.0, slow=2.0), "fast=1.0, slow=2.0"),
    ],
)
def test_bad_knobs_are_named(call, says):
    with pytest.raises(OviError, match=says):
        call()
