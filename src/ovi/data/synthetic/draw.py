"""Scenes drawn by chance, with all impacts well apart and every ball within the picture."""

from __future__ import annotations

import itertools
import math

import numpy as np

from ovi.data.synthetic.scene import Ball, Scene
from ovi.errors import OviError

BALL_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 45, 40),
    "orange": (250, 145, 30),
    "yellow": (250, 225, 50),
    "green": (60, 200, 70),
    "cyan": (60, 215, 225),
    "blue": (70, 110, 250),
    "magenta": (235, 70, 210),
    "white": (245, 245, 245),
}
WALL_COLOURS: tuple[tuple[int, int, int], ...] = (
    (30, 32, 40),
    (52, 44, 40),
    (36, 48, 66),
    (44, 58, 48),
    (66, 60, 74),
)
FLOOR_COLOURS: tuple[tuple[int, int, int], ...] = ((92, 88, 84), (104, 82, 62), (76, 88, 100), (84, 96, 78))
PITCH_BANDS: dict[str, tuple[float, float]] = {
    "low": (150.0, 300.0),
    "middle": (420.0, 800.0),
    "high": (1100.0, 2000.0),
}
"""Bands in Hz that the captions name; the gaps between them keep the names apart."""
SIZES: dict[str, tuple[float, float]] = {"small": (0.12, 0.15), "medium": (0.17, 0.20), "large": (0.22, 0.25)}
_TRIES = 400


def sample_scene(
    rng: np.random.Generator,
    *,
    duration_s: float = 2.0,
    num_balls: tuple[int, int] = (1, 1),
    max_impacts: int = 5,
    min_interval_s: float = 0.45,
    margin_s: float = 0.1,
    drop_height: tuple[float, float] = (0.3, 0.45),
    travel: tuple[float, float] = (0.0, 0.5),
    restitution: tuple[float, float] = (0.8, 1.0),
    floor_height: tuple[float, float] = (0.06, 0.2),
    noise_level: float = 0.0005,
) -> Scene:
    """Draw a scene.

    Args:
        rng: source of every random choice.
        duration_s: length of the clip the impacts are placed in.
        num_balls: fewest and most balls; each has its own colour, pitch and lane.
        max_impacts: the most impacts, of all balls together; how many is drawn evenly among what fits.
        min_interval_s: the least time between two impacts of any ball.
        margin_s: no impact closer than this to either end, before or after it.
        drop_height: range of the apex above the height at impact, in picture heights; slow flights get a higher one.
        travel: range of the way across its lane that a ball drifts during the clip, 0..1.
        restitution: range of speed after over speed before an impact.
        floor_height: range of the floor's top, in picture heights.
        noise_level: standard deviation of the background noise, full scale 1.

    Raises:
        OviError: when the clip is too short for one impact of every ball.
    """
    balls_from, balls_to = num_balls
    if not 1 <= balls_from <= balls_to <= 3:
        raise OviError(f"num_balls must be a range within 1..3, got {tuple(num_balls)}")
    room_s = duration_s - 2.0 * margin_s
    fits = 1 + math.floor(room_s / min_interval_s + 1e-9)
    if room_s <= 0 or fits < balls_to or max_impacts < balls_to:
        raise OviError(
            f"{duration_s:.3g} s hold no more than {max(0, min(fits, max_impacts)) if room_s > 0 else 0} impacts, but "
            f"{balls_to} balls need one each: raise num_frames (or duration_s) or max_impacts, or lower num_balls, "
            "min_interval_s or margin_s"
        )
    count = int(rng.integers(balls_from, balls_to + 1))
    floor = float(rng.uniform(*floor_height))
    flights = _sample_flights(rng, count, duration_s, min(fits, max_impacts), min_interval_s, margin_s, restitution)

    colours = rng.permutation(list(BALL_COLOURS))[:count]
    pitches = rng.permutation(list(PITCH_BANDS))[:count]
    lanes = rng.permutation(count)
    balls = []
    for number, (first_s, lasts_s, keeps) in enumerate(flights):
        size = str(rng.choice(list(SIZES)))
        radius = rng.uniform(*SIZES[size]) / (0.6 + 0.4 * count)  # each within its lane
        apex = float(np.exp(rng.uniform(*np.log(drop_height))))
        # An impact is only seen at some speed (one picture height a second), and the whole ball stays in the picture.
        apex = min(max(apex, 0.25 * lasts_s), 0.98 - floor - 2.0 * radius)
        gravity = 8.0 * apex / lasts_s**2
        x, x_end = _sample_drift(rng, lanes[number] / count, (lanes[number] + 1) / count, radius, travel)
        low, high = PITCH_BANDS[str(pitches[number])]
        impacts, speeds = _impacts(first_s, lasts_s, keeps, duration_s, gravity)
        colour = str(colours[number])
        balls.append(
            Ball(
                colour=colour,
                rgb=BALL_COLOURS[colour],
                size=size,
                radius=float(radius),
                x=float(x),
                x_speed=float((x_end - x) / duration_s),
                drop_height=apex,
                gravity=float(gravity),
                restitution=float(keeps),
                first_impact_s=float(first_s),
                pitch=str(pitches[number]),
                pitch_hz=float(np.exp(rng.uniform(np.log(low), np.log(high)))),
                decay_s=float(rng.uniform(0.08, 0.15)),
                impacts_s=tuple(impacts),
                strengths=tuple(0.4 + 0.6 * min(1.0, v / 5.0) for v in speeds),
            )
        )
    return Scene(
        duration_s=float(duration_s),
        balls=tuple(balls),
        floor_height=floor,
        wall_rgb=WALL_COLOURS[int(rng.integers(len(WALL_COLOURS)))],
        floor_rgb=FLOOR_COLOURS[int(rng.integers(len(FLOOR_COLOURS)))],
        noise_seed=int(rng.integers(2**31)),
        noise_level=float(noise_level),
    )


def _sample_flights(
    rng: np.random.Generator,
    count: int,
    duration_s: float,
    most: int,
    min_interval_s: float,
    margin_s: float,
    restitution: tuple[float, float],
) -> list[tuple[float, float, float]]:
    """(first impact, length of the flight it ends, restitution) of every ball, with all impacts well apart.

    Drawn and thrown back until they are; the number of impacts is drawn first, so that many are as frequent as few.
    """
    wanted = int(rng.integers(count, most + 1))
    close = (min_interval_s, max(min_interval_s, 1.25 * duration_s))
    for tries in range(_TRIES):
        flights = []
        for _ in range(count):
            # A flight of about count * duration / impacts makes that many; a little spread keeps it from being fixed.
            aim = float(np.clip(count * duration_s / wanted * rng.uniform(0.8, 1.35), *close))
            keeps = float(rng.uniform(*restitution)) if tries < _TRIES // 2 else restitution[1]
            lasts = aim / keeps ** ((wanted / count - 1) / 2)
            flights.append((lasts * float(rng.uniform()), lasts, keeps))
        times = sorted(t for first, lasts, keeps in flights for t in _impacts(first, lasts, keeps, duration_s, 1.0)[0])
        gaps_kept = all(b - a >= min_interval_s for a, b in itertools.pairwise(times))
        beyond = [_next_impact(*flight, duration_s) for flight in flights]
        ends_kept = (
            min(first for first, _, _ in flights) >= margin_s
            and max(times, default=0.0) <= duration_s - margin_s
            and min(beyond) >= duration_s + margin_s
            and all(first < duration_s for first, _, _ in flights)
        )
        if gaps_kept and ends_kept and (len(times) == wanted or tries >= _TRIES // 4):
            return flights
    # Crowded beyond chance: one impact for each ball, evenly spread, every other flight outlasting the clip.
    room = duration_s - 2.0 * margin_s
    first = [margin_s + room * (k + 0.5) / count if count * min_interval_s <= room else margin_s for k in range(count)]
    if count * min_interval_s > room:
        first = [margin_s + (room * k / (count - 1) if count > 1 else room / 2) for k in range(count)]
    return [(t, max(t, duration_s + margin_s - t) * 1.01, 1.0) for t in first]


def _impacts(
    first_s: float, lasts_s: float, keeps: float, until_s: float, gravity: float
) -> tuple[list[float], list[float]]:
    """Times of the impacts before ``until_s`` and the speed of each."""
    times: list[float] = []
    speeds: list[float] = []
    at, speed = first_s, 0.5 * gravity * lasts_s
    while at < until_s and len(times) < 1000:
        times.append(at)
        speeds.append(speed)
        speed, lasts_s = speed * keeps, lasts_s * keeps
        at += lasts_s
    return times, speeds


def _next_impact(first_s: float, lasts_s: float, keeps: float, after_s: float) -> float:
    at = first_s
    while at < after_s and lasts_s > 1e-3:
        lasts_s *= keeps
        at += lasts_s
    return at


def _sample_drift(
    rng: np.random.Generator, left: float, right: float, radius: float, travel: tuple[float, float]
) -> tuple[float, float]:
    """Where a ball begins and ends within its lane, wholly inside of it."""
    low, high = left + radius, right - radius
    way = float(rng.uniform(*travel)) * (high - low)
    begin = float(rng.uniform(low, high - way))
    ends = (begin, begin + way)
    return ends if rng.uniform() < 0.5 else (ends[1], ends[0])
