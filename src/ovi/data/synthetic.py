"""Synthetic clips whose truth is known: balls bounce on a floor and every impact sounds.

Motion is closed-form (parabolas joined at impacts, speed times restitution at each), so picture impacts, sound onsets,
pitch, colour and count are known exactly. Nothing in the picture but the fall tells when the sound must come: a model
that syncs these clips has learnt to.

Lengths along y are in picture heights measured upwards from the bottom, along x in picture widths, radii in the
smaller of the two.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ovi.data.media import Clip, write_clip
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
_COUNTS = ("no times", "once", "twice", "three times", "four times", "five times", "six times", "seven times")
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven")
_TRIES = 400


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


@dataclass(frozen=True)
class SyntheticClip:
    """A rendered clip, its caption, and the truth as JSON-ready data."""

    clip: Clip
    caption: str
    truth: dict[str, Any]


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


def caption(scene: Scene) -> str:
    """What is seen and heard in words, the sound between ``<AUDCAP>`` and ``<ENDAUDCAP>`` as Ovi's prompts have it."""
    seen = [f"a {b.size} {b.colour} ball bounces {_word(_COUNTS, len(b.impacts_s), ' times')}" for b in scene.balls]
    heard = [
        f"{_word(_NUMBERS, len(b.impacts_s))} {b.pitch} pitched knock{'' if len(b.impacts_s) == 1 else 's'}"
        for b in scene.balls
    ]
    picture = f"{' and '.join(seen)} on the floor."
    sound = f"{' and '.join(heard)}, one at each bounce."
    return f"{picture[0].upper()}{picture[1:]} <AUDCAP>{sound[0].upper()}{sound[1:]}<ENDAUDCAP>"


def truth(scene: Scene) -> dict[str, Any]:
    """The scene's facts as JSON-ready data; figures of a single ball stand at the top level too."""
    facts: dict[str, Any] = {
        "impacts_s": list(scene.impacts_s),
        "count": len(scene.impacts_s),
        "num_balls": len(scene.balls),
        "duration_s": scene.duration_s,
        "balls": [
            {
                "colour": b.colour,
                "size": b.size,
                "pitch": b.pitch,
                "pitch_hz": b.pitch_hz,
                "impacts_s": list(b.impacts_s),
                "strengths": list(b.strengths),
                "gravity": b.gravity,
                "restitution": b.restitution,
            }
            for b in scene.balls
        ],
    }
    if len(scene.balls) == 1:
        facts.update({k: facts["balls"][0][k] for k in ("colour", "size", "pitch", "pitch_hz")})
    return facts


def synthetic_clip(
    index: int,
    *,
    seed: int,
    fps: float,
    num_frames: int,
    height: int,
    width: int,
    sample_rate: int,
    **knobs: Any,
) -> SyntheticClip:
    """The clip numbered ``index`` of the endless set that ``seed`` names, whatever was drawn before.

    The margin at either end is two frames at low rates: a bounce is seen only with pictures before and after it.

    Args:
        index, seed: not negative.
        knobs: of ``sample_scene``.
    """
    rng = np.random.default_rng([seed, index])
    knobs = {"duration_s": num_frames / fps, "margin_s": max(0.1, 2.0 / fps), **knobs}
    scene = sample_scene(rng, **knobs)
    clip = render(scene, fps=fps, num_frames=num_frames, height=height, width=width, sample_rate=sample_rate)
    return SyntheticClip(clip, caption(scene), truth(scene))


def write_synthetic(
    folder: str | Path,
    *,
    num_clips: int,
    seed: int,
    fps: float,
    num_frames: int,
    height: int,
    width: int,
    sample_rate: int,
    knobs: Mapping[str, Any] | None = None,
    num_workers: int = 0,
) -> Path:
    """Write ``clip_000000.mp4`` and so on, and ``captions.jsonl`` with file, caption and truth of each.

    Clips that are there already are kept, so an interrupted run goes on where it stopped. ``synthetic.json`` keeps the
    settings: going on with others would mix two sets.

    Args:
        folder: made where missing.
        num_clips: how many.
        knobs: of ``sample_scene``.
        num_workers: processes to spread the work over; 0 stays in this one.

    Returns:
        The path of ``captions.jsonl``.

    Raises:
        OviError: when the folder holds clips of other settings.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "seed": seed,
        "fps": fps,
        "num_frames": num_frames,
        "height": height,
        "width": width,
        "sample_rate": sample_rate,
        **dict(knobs or {}),
    }
    _claim(folder / "synthetic.json", settings)
    jobs = [(str(folder), index, settings) for index in range(num_clips)]
    if num_workers > 0:
        # Spawned, not forked: the caller may have threads running (torch, FFmpeg), which a fork would leave hanging.
        with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            lines = list(pool.map(_write_one, jobs, chunksize=16))
    else:
        lines = [_write_one(job) for job in jobs]
    captions = folder / "captions.jsonl"
    _write_text(captions, "".join(f"{line}\n" for line in lines))
    return captions


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


def _word(words: tuple[str, ...], number: int, unit: str = "") -> str:
    return words[number] if number < len(words) else f"{number}{unit}"


def _write_one(job: tuple[str, int, dict[str, Any]]) -> str:
    folder, index, settings = job
    name = f"clip_{index:06d}.mp4"
    path = Path(folder) / name
    knobs = dict(settings)
    if path.exists():  # its words and truth follow from the seed; no need to draw pictures again
        geometry = {k: knobs.pop(k) for k in ("fps", "num_frames", "height", "width", "sample_rate")}
        seed, fps = knobs.pop("seed"), geometry["fps"]
        knobs = {"duration_s": geometry["num_frames"] / fps, "margin_s": max(0.1, 2.0 / fps), **knobs}
        scene = sample_scene(np.random.default_rng([seed, index]), **knobs)
        return json.dumps({"file": name, "caption": caption(scene), "truth": truth(scene)})
    made = synthetic_clip(index, **knobs)
    write_clip(path, made.clip, preset="veryfast")  # thousands of small files: time counts, size does not
    return json.dumps({"file": name, "caption": made.caption, "truth": made.truth})


def _claim(path: Path, settings: dict[str, Any]) -> None:
    """Leave the settings in the folder, or check that those found there are the same."""
    text = json.dumps(settings, sort_keys=True, indent=1)
    if path.exists():
        found = json.loads(path.read_text())
        if found != json.loads(text):
            differ = sorted(k for k in {*found, *settings} if found.get(k) != json.loads(text).get(k))
            raise OviError(
                f"{path.parent} holds synthetic clips made with other {', '.join(differ)} "
                f"({', '.join(f'{k}={found.get(k)}' for k in differ)}): give another folder, or empty this one"
            )
    else:
        _write_text(path, text)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
