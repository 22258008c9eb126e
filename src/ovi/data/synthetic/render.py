"""Pictures and sound of a scene."""

from __future__ import annotations

import math

import numpy as np

from ovi.data.media import Clip
from ovi.data.synthetic.scene import Scene


def render(scene: Scene, *, fps: float, num_frames: int, height: int, width: int, sample_rate: int) -> Clip:
    """Pictures and sound of a scene; frame n is the instant (n + 0.5) / fps, sample n the instant n / sample_rate.

    Args:
        scene: what to render.
        fps: frames per second.
        num_frames: T.
        height, width: in pixels.
        sample_rate: in Hz.
    """
    num_samples = round(num_frames * sample_rate / fps)
    frames = _pictures(scene, (np.arange(num_frames) + 0.5) / fps, height, width)
    return Clip(frames, _sound(scene, num_samples, sample_rate), fps, sample_rate)


def _pictures(scene: Scene, times_s: np.ndarray, height: int, width: int) -> np.ndarray:
    rows = height - 1 - np.arange(height)  # pixel row i spans rows[i] to rows[i] + 1 above the bottom
    floor = np.clip(scene.floor_height * height - rows, 0.0, 1.0)[:, None, None]
    still = np.broadcast_to(
        floor * np.array(scene.floor_rgb, float) + (1.0 - floor) * np.array(scene.wall_rgb, float), (height, width, 3)
    )
    frames = np.broadcast_to(np.round(still).astype(np.uint8), (len(times_s), height, width, 3)).copy()
    side = min(height, width)
    for ball in scene.balls:
        r = ball.radius * side
        x = (ball.x + ball.x_speed * times_s) * width
        y = height - (scene.floor_height + ball.heights(times_s)) * height - r
        for n in range(len(times_s)):
            # Only the box around the disc: a full-size clip costs no more than its ball.
            top, bottom = max(0, math.floor(y[n] - r - 1)), min(height, math.ceil(y[n] + r + 1))
            left, right = max(0, math.floor(x[n] - r - 1)), min(width, math.ceil(x[n] + r + 1))
            if top >= bottom or left >= right:
                continue
            dy = (np.arange(top, bottom) + 0.5 - y[n])[:, None]
            dx = (np.arange(left, right) + 0.5 - x[n])[None, :]
            # Coverage of a pixel by a disc: distance to the rim, a pixel wide.
            share = np.clip(r + 0.5 - np.sqrt(dy * dy + dx * dx), 0.0, 1.0)[..., None]
            box = frames[n, top:bottom, left:right]
            box[...] = np.round(share * np.array(ball.rgb, float) + (1.0 - share) * box)
    return frames


def _sound(scene: Scene, num_samples: int, sample_rate: int) -> np.ndarray:
    rng = np.random.default_rng(scene.noise_seed)
    wave = rng.standard_normal(num_samples) * scene.noise_level
    for ball in scene.balls:
        for at, strength in zip(ball.impacts_s, ball.strengths, strict=True):
            begin = math.ceil(at * sample_rate)
            since = np.arange(begin, min(num_samples, begin + round(3 * ball.decay_s * sample_rate))) / sample_rate - at
            if not len(since):
                continue
            tone = np.zeros(len(since))
            for harmonic, level in ((1, 1.0), (2, 0.45), (3, 0.2), (4.2, 0.12)):
                hz = harmonic * ball.pitch_hz
                if hz < 0.45 * sample_rate:
                    tone += level * np.sin(2 * np.pi * hz * since) * np.exp(-3.0 * harmonic**0.5 * since / ball.decay_s)
            click = rng.standard_normal(len(since)) * np.exp(-since / 0.0015)
            # A rise of 1 ms from exactly the impact on: sharp, without the splash of a step.
            attack = np.sin(np.pi / 2 * np.clip(since / 0.001, 0.0, 1.0)) ** 2
            wave[begin : begin + len(since)] += strength * attack * (0.45 * tone + 0.12 * click)
    return np.clip(wave, -1.0, 1.0).astype(np.float32)
