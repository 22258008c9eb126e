"""Synthetic clips against their own truth, measured back from pixels and samples by other means."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from ovi.data.media import read_clip
from ovi.data.synthetic import (
    BALL_COLOURS,
    PITCH_BANDS,
    Scene,
    caption,
    render,
    sample_scene,
    synthetic_clip,
    truth,
    write_synthetic,
)
from ovi.errors import OviError

GEOMETRY = {"fps": 16, "num_frames": 32, "height": 64, "width": 64, "sample_rate": 16000}


def scenes(number: int, **knobs) -> list[Scene]:
    return [sample_scene(np.random.default_rng([5, n]), **knobs) for n in range(number)]


@pytest.mark.parametrize(
    "knobs", [{}, {"num_balls": (1, 3)}, {"num_balls": (3, 3)}, {"duration_s": 5.0}, {"duration_s": 1.0}]
)
def test_impacts_are_well_apart_and_inside(knobs):
    duration_s = knobs.get("duration_s", 2.0)
    for scene in scenes(150, **knobs):
        times = np.array(scene.impacts_s)
        assert 1 <= len(times) <= 5
        assert times.min() >= 0.1
        assert times.max() <= duration_s - 0.1
        assert (np.diff(times) >= 0.45 - 1e-9).all()
        assert all(ball.impacts_s for ball in scene.balls)
        assert len({b.colour for b in scene.balls}) == len({b.pitch for b in scene.balls}) == len(scene.balls)


def test_scenes_differ_in_everything_a_caption_states():
    drawn = scenes(400)
    for count in (1, 2, 3, 4):
        assert 0.12 < np.mean([len(s.impacts_s) == count for s in drawn]) < 0.4
    balls = [s.balls[0] for s in drawn]
    for name, values in (("colour", BALL_COLOURS), ("pitch", PITCH_BANDS), ("size", ("small", "medium", "large"))):
        for value in values:
            assert np.mean([getattr(b, name) == value for b in balls]) > 0.5 / len(values), (name, value)
    gravities = [b.gravity for b in balls]
    assert np.percentile(gravities, 90) > 4 * np.percentile(gravities, 10)
    phases = np.array([s.impacts_s[0] % 0.45 for s in drawn]) / 0.45
    assert np.histogram(phases, 4, (0, 1))[0].min() > 60  # nothing favours one phase of the grid


def test_motion_obeys_the_equation_of_motion():
    """Against a numerical integration with bounces as events, which knows no closed form."""
    for scene in scenes(12):
        ball = scene.balls[0]
        speed = np.sqrt(2 * ball.gravity * ball.drop_height)
        since = 2 * speed / ball.gravity - ball.first_impact_s
        state = [speed * since - ball.gravity * since**2 / 2, speed - ball.gravity * since]

        def ground(t, y):
            return y[0]

        ground.terminal, ground.direction = True, -1
        now, impacts = 0.0, []
        times, heights = (np.arange(64) + 0.5) / 32, np.zeros(64)
        while now < 2.0:
            run = solve_ivp(
                lambda t, y, g=ball.gravity: [y[1], -g],
                (now, 2.0),
                state,
                events=ground,
                dense_output=True,
                rtol=1e-10,
                atol=1e-12,
                max_step=0.05,
            )
            here = (times >= now) & (times <= run.t[-1])
            heights[here] = run.sol(times[here])[0]
            now = run.t[-1]
            if run.status == 1:
                impacts.append(now)
                state = [1e-12, -ball.restitution * run.y[1, -1]]
        assert impacts == pytest.approx(ball.impacts_s, abs=1e-6)
        assert ball.heights(times) == pytest.approx(heights, abs=1e-6)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 96), (96, 48)])
def test_the_disc_is_where_the_scene_says(height, width):
    for scene in scenes(6):
        ball = scene.balls[0]
        clip = render(scene, fps=16, num_frames=32, height=height, width=width, sample_rate=16000)
        empty = render(replace(scene, balls=()), fps=16, num_frames=32, height=height, width=width, sample_rate=16000)
        change = np.abs(clip.frames.astype(float) - empty.frames).sum(-1)
        area = change / change.reshape(32, -1).max(1)[:, None, None]
        t = (np.arange(32) + 0.5) / 16
        mass = area.sum((1, 2))
        side = min(height, width)
        assert mass == pytest.approx(np.pi * (ball.radius * side) ** 2, rel=0.08)
        y = (area.sum(2) @ (np.arange(height) + 0.5)) / mass
        x = (area.sum(1) @ (np.arange(width) + 0.5)) / mass
        assert x == pytest.approx((ball.x + ball.x_speed * t) * width, abs=0.15)
        bottom = height - y - ball.radius * side
        assert bottom == pytest.approx((scene.floor_height + ball.heights(t)) * height, abs=0.15)
        colour = clip.frames[0][np.unravel_index(change[0].argmax(), (height, width))]
        assert tuple(colour) == ball.rgb


def test_sound_starts_with_the_impact_at_the_stated_pitch():
    for n in range(12):
        made = synthetic_clip(n, seed=2, **GEOMETRY)
        wave, rate = made.clip.waveform.astype(float), 16000
        for at, strength in zip(made.truth["impacts_s"], made.truth["balls"][0]["strengths"], strict=True):
            begin = round(at * rate)
            assert np.abs(wave[begin - 160 : begin - 1]).max() < 0.05 * strength  # the last tone has died down
            attack = np.abs(wave[begin : begin + 400])
            assert np.flatnonzero(attack > 0.3 * attack.max())[0] < 0.002 * rate
            piece = wave[begin + 64 : begin + 1600]
            spectrum = np.abs(np.fft.rfft(piece * np.hanning(len(piece)), 1 << 17))
            peak_hz = spectrum.argmax() * rate / (1 << 17)
            assert peak_hz == pytest.approx(made.truth["pitch_hz"], rel=0.02)
        quiet = wave[: round((made.truth["impacts_s"][0] - 0.01) * rate)]
        assert 1e-4 < quiet.std() < 1e-3


def test_captions_state_the_truth():
    for n in range(40):
        made = synthetic_clip(n, seed=1, **GEOMETRY)
        picture, sound = made.caption.split("<AUDCAP>")
        assert sound.endswith("<ENDAUDCAP>")
        times = {1: ("once", "one"), 2: ("twice", "two"), 3: ("three times", "three"), 4: ("four times", "four")}
        seen, heard = times[made.truth["count"]]
        for word in (seen, made.truth["colour"], made.truth["size"]):
            assert word in picture
        assert f"{heard} {made.truth['pitch']} pitched knock" in sound.lower()
        assert ("knocks" in sound) == (made.truth["count"] > 1)
        assert json.loads(json.dumps(made.truth)) == made.truth
    three = sample_scene(np.random.default_rng(0), num_balls=(3, 3))
    assert all(b.colour in caption(three) and b.pitch in caption(three) for b in three.balls)
    assert truth(three)["num_balls"] == 3


def test_a_clip_depends_on_seed_and_index_only():
    first = synthetic_clip(7, seed=3, **GEOMETRY)
    np.random.default_rng(0).normal(size=10)
    again = synthetic_clip(7, seed=3, **GEOMETRY)
    assert np.array_equal(first.clip.frames, again.clip.frames)
    assert np.array_equal(first.clip.waveform, again.clip.waveform)
    assert (first.caption, first.truth) == (again.caption, again.truth)
    for other in (synthetic_clip(8, seed=3, **GEOMETRY), synthetic_clip(7, seed=4, **GEOMETRY)):
        assert other.truth["impacts_s"] != first.truth["impacts_s"]
    # The same scene at another size and rate: geometry is no part of the draw.
    small = synthetic_clip(7, seed=3, fps=16, num_frames=32, height=32, width=48, sample_rate=8000)
    assert small.truth == first.truth


def test_writing_resumes_and_matches_its_truth(tmp_path):
    geometry = {**GEOMETRY, "height": 32, "width": 32}
    captions = write_synthetic(tmp_path / "a", num_clips=3, seed=9, knobs={"max_impacts": 3}, **geometry)
    kept = (tmp_path / "a" / "clip_000001.mp4").stat().st_mtime_ns
    write_synthetic(tmp_path / "a", num_clips=5, seed=9, knobs={"max_impacts": 3}, **geometry)
    assert (tmp_path / "a" / "clip_000001.mp4").stat().st_mtime_ns == kept
    write_synthetic(tmp_path / "b", num_clips=5, seed=9, knobs={"max_impacts": 3}, num_workers=2, **geometry)
    assert captions.read_text() == (tmp_path / "b" / "captions.jsonl").read_text()
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["captions.jsonl", *[f"clip_{n:06d}.mp4" for n in range(5)], "synthetic.json"]
    lines = [json.loads(line) for line in captions.read_text().splitlines()]
    assert [line["file"] for line in lines] == names[1:6]
    for n, line in enumerate(lines):
        made = synthetic_clip(n, seed=9, max_impacts=3, **geometry)
        assert (line["caption"], line["truth"]) == (made.caption, made.truth)
        back = read_clip(tmp_path / "a" / line["file"], **geometry)
        assert np.abs(back.frames.astype(int) - made.clip.frames).mean() < 4.0  # 4:2:0 blurs a saturated rim
        assert np.corrcoef(back.waveform, made.clip.waveform)[0, 1] > 0.95  # AAC blurs the clicks' noise
    with pytest.raises(OviError, match="seed"):
        write_synthetic(tmp_path / "a", num_clips=5, seed=10, knobs={"max_impacts": 3}, **geometry)


def test_impossible_scenes_name_the_knobs():
    with pytest.raises(OviError, match="min_interval_s"):
        sample_scene(np.random.default_rng(0), duration_s=0.8, num_balls=(3, 3))
    with pytest.raises(OviError, match="num_frames"):
        sample_scene(np.random.default_rng(0), duration_s=0.15)
    with pytest.raises(OviError, match="num_balls"):
        sample_scene(np.random.default_rng(0), num_balls=(0, 1))
