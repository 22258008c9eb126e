"""Filters over clips whose truth is planted: shifts, levels, speeds, borders, freezes, and a clock in the picture."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from ovi.data.media import Clip, Crop, read_clip, write_clip
from ovi.data.sources import ClipFormat
from ovi.data.stages.base import Candidate, Rejected, run_stages
from ovi.data.stages.borders import Borders
from ovi.data.stages.lip_sync import LipSync
from ovi.data.stages.loudness import FLOOR_DB, Loudness, Silence, level_db, longest_run
from ovi.data.stages.motion import Motion
from ovi.data.stages.optical_flow import block_flow
from ovi.data.stages.pictures import iter_pictures, pictures_at
from ovi.data.stages.stillness import Stillness
from ovi.data.stages.sync import Sync
from ovi.data.stages.windows import Windows
from ovi.data.synthetic import synthetic_clip
from ovi.errors import OviError
from ovi.metrics.av_offset import av_offset

FORM = ClipFormat(fps=24, num_frames=48, height=64, width=64, sample_rate=16000)


def candidate(clip: Clip, key: str = "a") -> Candidate:
    return Candidate(Path(f"{key}.mp4"), key, clip=clip, form=FORM)


def judged(stage, clip: Clip) -> Candidate | Rejected:
    rejected: list[Rejected] = []
    kept = list(stage([candidate(clip)], rejected.append))
    return (kept + rejected)[0]


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """float [H, W] in 0..1, smooth at the scale of a few pixels."""
    from scipy.ndimage import gaussian_filter

    noise = gaussian_filter(np.random.default_rng(seed).standard_normal((height, width)), 3.0, mode="wrap")
    return (noise - noise.min()) / (noise.max() - noise.min())


def bounce(index: int = 0, size: int = 64) -> Clip:
    return synthetic_clip(index, seed=4, fps=24, num_frames=48, height=size, width=size, sample_rate=16000).clip


# --- sound -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amplitude", [1.0, 0.1, 0.001])
def test_loudness_is_that_of_volumedetect(amplitude):
    """A sine's root mean square is its amplitude over root 2: -3.01 dB at full scale."""
    t = np.arange(32000) / 16000
    wave = (amplitude * np.sin(2 * np.pi * 440 * t)).astype(np.float32)
    kept = judged(Loudness(min_db=None), Clip(np.zeros((48, 8, 8, 3), np.uint8), wave, 24, 16000))
    assert kept.figures["loudness_db"] == pytest.approx(20 * math.log10(amplitude) - 3.0103, abs=0.01)
    assert kept.figures["peak_db"] == pytest.approx(20 * math.log10(amplitude), abs=0.01)
    ones = np.full(1000, amplitude)
    assert level_db(ones) == pytest.approx(20 * math.log10(amplitude), abs=1e-9)


def test_silence_and_whispers_are_rejected():
    frames = np.zeros((48, 8, 8, 3), np.uint8)
    verdict = judged(Loudness(), Clip(frames, np.zeros(32000, np.float32), 24, 16000))
    assert (verdict.reason, verdict.figures, verdict.threshold) == ("quiet", {"loudness_db": FLOOR_DB}, -60.0)
    for level, reason in ((-60.5, "quiet"), (-59.5, None)):
        wave = np.full(32000, 10 ** (level / 20), np.float32)
        assert getattr(judged(Loudness(), Clip(frames, wave, 24, 16000)), "reason", None) == reason
    clipping = judged(Loudness(max_peak_db=-1.0), Clip(frames, np.ones(32000, np.float32), 24, 16000))
    assert clipping.reason == "clipping"


def test_share_and_length_of_silence():
    """2 s: silent but for 0.3..0.5 s and 1.0..1.1 s."""
    wave = np.zeros(32000, np.float32)
    wave[4800:8000] = wave[16000:17600] = 0.1
    clip = Clip(np.zeros((48, 8, 8, 3), np.uint8), wave, 24, 16000)
    kept = judged(Silence(), clip)
    assert kept.figures["silent_share"] == pytest.approx(17 / 20)
    assert kept.figures["silent_s"] == pytest.approx(0.9)
    assert judged(Silence(max_share=0.8), clip).reason == "silent"
    assert judged(Silence(max_s=0.8), clip).figures == {"silent_s": pytest.approx(0.9)}
    assert [longest_run(np.array(f, bool)) for f in ([], [0], [1], [1, 1, 0, 1], [0, 1, 1, 1])] == [0, 0, 1, 2, 3]
    with pytest.raises(OviError, match="window_s"):
        Silence(window_s=0)


def estimate(frames, waveform, fps, sample_rate):
    found = av_offset(frames, waveform, fps=fps, sample_rate=sample_rate)
    return found.offset_ms, found.confidence


def shifted(clip: Clip, late_s: float) -> Clip:
    wave = np.zeros_like(clip.waveform)
    by = round(late_s * clip.sample_rate)
    wave[by:] = clip.waveform[: len(wave) - by]
    return Clip(clip.frames, wave, clip.fps, clip.sample_rate)


def test_shifted_sound_is_rejected_by_sync():
    clip = bounce(2)
    kept = judged(Sync(estimate), clip)
    assert isinstance(kept, Candidate)
    assert kept.figures["sync_confidence"] >= 0.2
    assert kept.figures["abs_offset_ms"] < 40
    verdict = judged(Sync(estimate), shifted(clip, 0.3))
    assert verdict.reason == "out_of_sync"
    assert verdict.candidate.figures["offset_ms"] == pytest.approx(300, abs=40)


@pytest.mark.parametrize(("offset_ms", "confidence"), [(math.nan, 0.9), (10.0, math.nan), (500.0, 0.1)])
def test_what_sync_cannot_tell_is_kept_or_rejected_as_asked(offset_ms, confidence):
    stage = Sync(lambda *_: (offset_ms, confidence))
    assert math.isnan(judged(stage, bounce()).figures["abs_offset_ms"])
    verdict = judged(Sync(lambda *_: (offset_ms, confidence), unsure="reject"), bounce())
    assert (verdict.reason, verdict.threshold) == ("unsure_sync", 0.2)
    with pytest.raises(OviError, match=r"sync\.unsure"):
        Sync(estimate, unsure="drop")


def test_speech_is_judged_by_lips_and_the_rest_by_events():
    """Two stages with an estimator each; which one judges a clip follows from its caption."""
    by_lips, by_events = LipSync(lambda *_: (200.0, 1.6)), Sync(lambda *_: (300.0, 0.9), speech="pass")
    for caption, knob in (("A man says <S>hello<E>.", "lip_sync.max_offset_ms"), ("A ball.", "sync.max_offset_ms")):
        spoken = replace(candidate(bounce()), caption=caption)
        found = [stage.judge(spoken) for stage in (by_lips, by_events)]
        (verdict,) = [one for one in found if isinstance(one, Rejected)]
        (passed,) = [one for one in found if isinstance(one, Candidate)]
        assert (verdict.reason, knob in verdict.message) == ("out_of_sync", True)
        assert passed is spoken
    assert by_lips.min_confidence == 1.5
    with pytest.raises(OviError, match=r"sync\.speech"):
        Sync(estimate, speech="skip")


# --- motion ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [(0, 1), (2, 0), (3, -2), (0.5, 0.25), (0, 6)])
def test_flow_of_a_picture_moved_by_a_known_step(step):
    from scipy.ndimage import shift

    picture = texture(96, 128)
    moved = shift(picture, step, order=3, mode="grid-wrap")
    flow = block_flow(picture[None].astype(np.float32), moved[None].astype(np.float32))
    assert flow.shape == (1, 12, 16, 2)
    assert np.median(flow[0].reshape(-1, 2), axis=0) == pytest.approx(step, abs=0.1)


def test_motion_is_in_picture_heights_per_second_whatever_size_and_rate():
    """A texture rolls by 1/64 of the height a frame at 24 fps: 0.375 heights a second."""
    for size, fps, every in ((64, 24.0, 1), (192, 24.0, 1), (64, 48.0, 0.5)):
        picture = texture(size, size)
        from scipy.ndimage import shift

        step = every * size / 64
        frames = [shift(picture, (0, n * step), order=1, mode="grid-wrap") for n in range(12)]
        clip = Clip((np.stack(frames)[..., None].repeat(3, -1) * 255).astype(np.uint8), np.zeros(100), fps, 16000)
        measured = judged(Motion(), clip).figures["motion"]
        assert measured == pytest.approx(24 / 64, rel=0.15), (size, fps)


def test_still_and_wild_pictures_are_told_by_motion():
    still = Clip(
        (texture(64, 64)[..., None].repeat(3, -1) * 255).astype(np.uint8)[None].repeat(48, 0), np.zeros(9), 24, 1
    )
    verdict = judged(Motion(), still)
    assert (verdict.reason, verdict.figures) == ("little_motion", {"motion": 0.0})
    flat = Clip(np.full((48, 64, 64, 3), 90, np.uint8), np.zeros(9), 24, 1)
    assert judged(Motion(), flat).figures == {"motion": 0.0}
    moving = judged(Motion(), bounce())
    assert isinstance(moving, Candidate)
    assert judged(Motion(high=moving.figures["motion"] / 2), bounce()).reason == "much_motion"


@pytest.mark.parametrize("crf", [12, 28])
def test_a_still_picture_through_the_encoder_is_rejected(tmp_path, crf):
    frame = (texture(64, 64)[..., None].repeat(3, -1) * 255).astype(np.uint8)
    wave = (0.1 * np.random.default_rng(0).standard_normal(32000)).astype(np.float32)
    write_clip(tmp_path / "still.mp4", Clip(frame[None].repeat(48, 0), wave, 24, 16000), crf=crf)
    rejected: list[Rejected] = []
    stages = {"windows": Windows(FORM), "stillness": Stillness()}
    assert not list(run_stages(stages, [Candidate(tmp_path / "still.mp4", "still")], rejected.append))
    assert rejected[0].reason == "still"
    assert rejected[0].figures["still_share"] > 0.9


def test_a_freeze_is_measured_in_seconds():
    """Frames 10..29 are one picture: 20 frames, 19 of 47 pairs."""
    clip = bounce(3)
    frames = clip.frames.copy()
    frames[10:30] = frames[10]
    plain = judged(Stillness(), clip)
    kept = judged(Stillness(), Clip(frames, clip.waveform, 24, 16000))
    assert plain.figures["still_share"] == 0
    assert kept.figures["still_share"] == pytest.approx(19 / 47)
    assert kept.figures["frozen_s"] == pytest.approx(20 / 24)
    assert judged(Stillness(max_frozen_s=0.5), Clip(frames, clip.waveform, 24, 16000)).reason == "frozen"
    twice = Clip(clip.frames.repeat(2, 0)[:48], clip.waveform, 24, 16000)
    assert judged(Stillness(), twice).figures["still_share"] == pytest.approx(24 / 47)


# --- borders ---------------------------------------------------------------------------------------------------------


def boxed(top: int, bottom: int, left: int, right: int, colour=(0, 0, 0), height=96, width=128) -> Clip:
    inner = bright(height - top - bottom, width - left - right)
    frames = np.empty((24, height, width, 3), np.uint8)
    frames[:] = colour
    frames[:, top : height - bottom, left : width - right] = inner
    wave = (0.1 * np.random.default_rng(0).standard_normal(32000)).astype(np.float32)
    return Clip(frames, wave[:16000], 24, 16000)


def bright(height: int, width: int) -> np.ndarray:
    base = 90 + 160 * texture(height, width, 3)
    return np.stack([np.roll(base, 2 * n, 1) for n in range(24)])[..., None].repeat(3, -1).astype(np.uint8)


BOX = ClipFormat(fps=24, num_frames=24, height=64, width=64, sample_rate=16000)


@pytest.mark.parametrize("box", [(12, 12, 0, 0), (0, 0, 16, 16), (8, 4, 6, 10), (0, 0, 0, 0)])
@pytest.mark.parametrize("start_s", [None, 0.5])
def test_letterboxes_are_found_to_the_pixel_and_cut_off(tmp_path, box, start_s):
    top, bottom, left, right = box
    write_clip(tmp_path / "boxed.mp4", boxed(*box))
    start = Candidate(tmp_path / "boxed.mp4", "b", start_s=start_s or 0.0, duration_s=start_s)
    (kept,) = Borders()([start], list().append)
    assert kept.figures["border_share"] == pytest.approx(1 - (96 - top - bottom) * (128 - left - right) / (96 * 128))
    found = tuple(int(kept.figures[f"border_{side}"]) for side in ("top", "bottom", "left", "right"))
    assert found == box
    assert kept.crop == (Crop(top, left, 96 - top - bottom, 128 - left - right) if any(box) else None)
    if any(box) and start_s is None:
        (clip,) = [c.decoded().clip for c in Windows(BOX)([kept], list().append)]
        assert clip.frames.min() > 60, "no black is left in any corner"
        verdicts: list[Rejected] = []
        assert not list(Borders(action="reject")([start], verdicts.append))
        assert (verdicts[0].reason, verdicts[0].threshold) == ("borders", 0.0)


def test_coloured_borders_only_where_asked_for_and_blank_pictures_never(tmp_path):
    write_clip(tmp_path / "red.mp4", boxed(16, 16, 0, 0, colour=(40, 160, 90)))
    red = Candidate(tmp_path / "red.mp4", "r")
    (plain,) = Borders()([red], list().append)
    assert plain.crop is None
    (cut,) = Borders(any_colour=True, margin=2)([red], list().append)
    assert cut.crop == Crop(18, 0, 60, 128)
    rejected: list[Rejected] = []
    black = Clip(np.zeros((24, 64, 64, 3), np.uint8), boxed(0, 0, 0, 0).waveform, 24, 16000)
    write_clip(tmp_path / "black.mp4", black)
    assert not list(Borders()([Candidate(tmp_path / "black.mp4", "k")], rejected.append))
    assert rejected[0].reason == "blank"
    assert not list(Borders(max_share=0.3, any_colour=True)([red], rejected.append))
    assert rejected[1].figures["border_share"] == pytest.approx(1 / 3)
    for knobs in ({"action": "paint"}, {"num_pictures": 0}, {"margin": -1}):
        with pytest.raises(OviError, match=next(iter(knobs))):
            Borders(**knobs)


def test_a_crop_reads_the_same_pixels_as_a_file_that_holds_no_more(tmp_path):
    """Cropped while reading, or before writing (losslessly): the same but for the colour format's rounding."""
    whole = boxed(16, 16, 32, 32)
    inner = Clip(np.ascontiguousarray(whole.frames[:, 16:-16, 32:-32]), whole.waveform, 24, 16000)
    write_clip(tmp_path / "whole.mp4", whole, crf=0)
    write_clip(tmp_path / "inner.mp4", inner, crf=0)
    form = dict(fps=24, num_frames=24, height=32, width=32, sample_rate=16000)
    a = read_clip(tmp_path / "whole.mp4", crop=Crop(16, 32, 64, 64), **form)
    b = read_clip(tmp_path / "inner.mp4", **form)
    assert np.abs(a.frames.astype(int) - b.frames).max() <= 3
    assert np.abs(a.frames.astype(int) - b.frames).mean() < 0.8
    np.testing.assert_array_equal(a.waveform, b.waveform)
    with pytest.raises(OviError, match="reaches beyond the upright picture"):
        read_clip(tmp_path / "whole.mp4", crop=Crop(40, 0, 64, 64), **form)


# --- time ------------------------------------------------------------------------------------------------------------

CLOCK_FPS, CLOCK_S, BITS = Fraction(30000, 1001), 60, 12


@pytest.fixture(scope="module")
def clock(tmp_path_factory) -> Path:
    """A minute at 29.97 fps: every frame shows its number in 12 blocks, and every second ticks."""
    path = tmp_path_factory.mktemp("clock") / "clock.mp4"
    count = int(CLOCK_S * CLOCK_FPS) + 1
    t = np.arange(44100) / 44100
    second = np.zeros(44100)
    second += 0.7 * np.exp(-(((t - 0.5) / 0.001) ** 2)) * np.cos(2 * np.pi * 3000 * (t - 0.5))
    wave = np.tile(second, CLOCK_S + 1).astype(np.float32)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=CLOCK_FPS, options={"preset": "ultrafast", "crf": "20"})
        video.height, video.width, video.pix_fmt = 48, 64, "yuv420p"
        audio = container.add_stream("aac", rate=44100, layout="mono")
        for n in range(count):
            bits = np.array([220 if n >> b & 1 else 30 for b in range(BITS)], np.uint8).reshape(3, 4)
            picture = bits.repeat(16, 0).repeat(16, 1)[..., None].repeat(3, -1)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
        for at in range(0, len(wave) - 1023, 1024):
            part = av.AudioFrame.from_ndarray(wave[None, at : at + 1024], format="fltp", layout="mono")
            part.sample_rate, part.pts = 44100, at
            container.mux(audio.encode(part))
        container.mux(audio.encode(None))
    return path


def shown(frames: np.ndarray) -> np.ndarray:
    blocks = frames.astype(float).mean(-1).reshape(len(frames), 3, 16, 4, 16).mean((2, 4)).reshape(len(frames), BITS)
    assert (np.abs(blocks - 125) > 50).all(), "two frames were mixed"
    return (blocks > 125) @ (1 << np.arange(BITS))


def test_a_minute_of_windows_shows_no_drift(clock):
    """29.97 to 24 fps: at every frame's middle the clock is right to half a source frame, every tick to 1 ms."""
    form = ClipFormat(fps=24, num_frames=121, height=48, width=64, sample_rate=16000)
    clips = [c.decoded() for c in Windows(form)([Candidate(clock, "clock")], list().append)]
    assert len(clips) == 11
    assert clips[-1].start_s == pytest.approx(10 * 121 / 24)
    for part in (clips[0], clips[5], clips[-1]):
        middles_s = part.start_s + (np.arange(121) + 0.5) / 24
        clock_s = (shown(part.clip.frames) + 0.5) / float(CLOCK_FPS)
        assert np.abs(clock_s - middles_s).max() <= 0.5 / float(CLOCK_FPS) + 1e-6
        ends_s = part.start_s + 121 / 24
        for tick_s in np.arange(math.ceil(part.start_s), math.floor(ends_s)) + 0.5:
            low = round((tick_s - part.start_s - 0.06) * 16000)
            energy = np.square(part.clip.waveform[max(0, low) : low + 1920].astype(float))
            found_s = part.start_s + (max(0, low) + (energy @ np.arange(len(energy))) / energy.sum()) / 16000
            assert abs(found_s - tick_s) < 1e-3


def test_pictures_of_spans_are_the_files_own(clock):
    """Streamed from anywhere, each picture once, at its own time; sparse ones are those at the times asked for."""
    step = 1 / float(CLOCK_FPS)
    for start_s in (0.0, 0.5, 30.0, 59.0):
        pictures = list(iter_pictures(clock, start_s=start_s, duration_s=0.5))
        numbers = shown(np.stack([p.rgb for p in pictures]))
        first = math.ceil(start_s / step - 1e-3)
        assert numbers.tolist() == list(range(first, first + len(numbers)))
        assert [p.time_s for p in pictures] == pytest.approx([n * step for n in numbers], abs=1e-4)
        assert len(numbers) in (14, 15)
    times_s = [0.0, 0.1, 2.0, 3.0, 20.0, 21.0, 59.9, 70.0]
    sparse = pictures_at(clock, times_s)
    expected = [math.ceil(t / step - 1e-3) for t in times_s[:-1]]
    assert shown(np.stack([p.rgb for p in sparse])).tolist() == expected
