"""What happens in a synthetic clip: balls, their motion in closed form, and when each of them sounds.

Lengths along y are in picture heights measured upwards from the bottom, along x in picture widths, radii in the
smaller of the two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ball:
    """One ball, its motion and its sound.

    Attributes:
        colour, rgb: the name captions use, and 0..255.
        size, radius: the name captions use, and in smaller picture sides.
        x, x_speed: centre at time 0 and its drift a second, in picture widths.
        drop_height: apex of the flight under way at time 0, above the height at impact, in picture heights.
        gravity: picture heights per second squared.
        restitution: speed after an impact over speed before.
        first_impact_s: when the flight under way at time 0 ends.
        pitch, pitch_hz: the name captions use, and the fundamental.
        decay_s: time in which its tone falls to a twentieth.
        impacts_s: impacts within the clip, in seconds.
        strengths: amplitude of each, 0..1, growing with the speed of impact.
    """

    colour: str
    rgb: tuple[int, int, int]
    size: str
    radius: float
    x: float
    x_speed: float
    drop_height: float
    gravity: float
    restitution: float
    first_impact_s: float
    pitch: str
    pitch_hz: float
    decay_s: float
    impacts_s: tuple[float, ...]
    strengths: tuple[float, ...]

    def heights(self, times_s: np.ndarray) -> np.ndarray:
        """Height of the centre above its height at impact, at any times from 0 on, in picture heights."""
        times_s = np.asarray(times_s, np.float64)
        out = np.zeros_like(times_s)
        speed = math.sqrt(2.0 * self.gravity * self.drop_height)
        begin = self.first_impact_s - 2.0 * speed / self.gravity
        last = float(times_s.max(initial=0.0))
        while begin <= last:
            lasts = 2.0 * speed / self.gravity
            if lasts < 1e-4:  # at rest for all the eye can tell
                break
            since = times_s - begin
            flying = (since >= 0) & (since < lasts)
            out[flying] = (speed * since - 0.5 * self.gravity * since**2)[flying]
            begin, speed = begin + lasts, speed * self.restitution
        return out


@dataclass(frozen=True)
class Scene:
    """Everything needed to render a clip at any size and rate.

    Attributes:
        duration_s: span in which impacts were placed.
        balls: one or more.
        floor_height: top of the floor, in picture heights above the bottom.
        wall_rgb, floor_rgb: 0..255.
        noise_seed: draws the clicks and the background noise.
        noise_level: standard deviation of the background noise, full scale 1.
    """

    duration_s: float
    balls: tuple[Ball, ...]
    floor_height: float
    wall_rgb: tuple[int, int, int]
    floor_rgb: tuple[int, int, int]
    noise_seed: int
    noise_level: float

    @property
    def impacts_s(self) -> tuple[float, ...]:
        """All impacts in order of time."""
        return tuple(sorted(t for ball in self.balls for t in ball.impacts_s))
