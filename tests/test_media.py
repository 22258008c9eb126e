"""Picture and sound through real codecs and containers, against a counter in the picture and ticks in the sound."""

from __future__ import annotations

import math
import pickle
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from ovi.data.media import Clip, Crop, MediaError, iter_clips, probe, read_clip, write_clip
from ovi.data.media.sound import Sound
from ovi.data.media.span import Span
from ovi.data.media.upright import Upright
from ovi.data.stages.pictures import iter_pictures, upright_size
from ovi.errors import OviError
from small_disk import full_disk

BITS = 8
GEOMETRY = {"height": 32, "width": 64, "sample_rate": 16000}


def counter_frames(num_frames: int) -> np.ndarray:
    """uint8 [T, 32, 64, 3]: frame n shows n in binary, as 8 blocks of 16x16."""
    frames = np.full((num_frames, 2, 4, 3), 30, np.uint8)
    for n in range(num_frames):
        for bit in range(BITS):
            if n >> bit & 1:
                frames[n, bit // 4, bit % 4] = 220
    return frames.repeat(16, 1).repeat(16, 2)


def counts(frames: np.ndarray) -> list[int]:
    """The number each frame shows."""
    blocks = frames.astype(float).mean(-1).reshape(len(frames), 2, 16, 4, 16).mean((2, 4)).reshape(len(frames), BITS)
    assert (np.abs(blocks - 125) > 60).all(), "a block is neither dark nor bright: two frames were mixed"
    return [int((row > 125) @ (1 << np.arange(BITS))) for row in blocks]


def ticks(times_s: list[float], duration_s: float, rate: int) -> np.ndarray:
    """float32 [N] with a short 3 kHz burst centred on each time."""
    t = np.arange(round(duration_s * rate)) / rate
    wave = np.zeros(len(t))
    for at in times_s:
        wave += 0.7 * np.exp(-(((t - at) / 0.001) ** 2)) * np.cos(2 * np.pi * 3000 * (t - at))
    return wave.astype(np.float32)


def tick_time(wave: np.ndarray, near_s: float, rate: int) -> float:
    """Centre of energy of the burst within 60 ms of a time."""
    low = max(0, round((near_s - 0.06) * rate))
    energy = np.square(wave[low : round((near_s + 0.06) * rate)].astype(float))
    assert energy.sum() > 1e-2, f"no tick at {near_s:.3f} s"
    return (low + float((energy * np.arange(len(energy))).sum() / energy.sum())) / rate


def write_source(
    path: Path,
    frames: np.ndarray,
    fps: Fraction,
    wave: np.ndarray | None,
    rate: int = 44100,
    layout: str = "stereo",
    codecs: tuple[str, str] = ("libx264", "aac"),
    video_late_s: float = 0.0,
    audio_late_s: float = 0.0,
    times_s: list[float] | None = None,
    options: dict[str, str] | None = None,
    audio_lead_s: float = 0.0,
    jitter_s: float = 0.0,
    lost_s: tuple[float, float] = (0.0, 0.0),
) -> Path:
    """A file as other programs make them: B-frames, stereo, any container; streams may start late.

    Sound may lie ahead of its pictures in the file, its timestamps may jitter, and packets of a time be lost.
    """
    jitter = np.random.default_rng(0)
    with av.open(str(path), "w", options=options or {}) as container:
        video = container.add_stream(codecs[0], rate=fps)
        video.height, video.width, video.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        tick = Fraction(1, 90000)
        video.codec_context.time_base = tick
        audio = container.add_stream(codecs[1], rate=rate, layout=layout) if wave is not None else None
        packets = []
        for n, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            at_s = Fraction(n) / fps if times_s is None else Fraction(times_s[n])
            frame.pts, frame.time_base = round((at_s + Fraction(video_late_s)) / tick), tick
            packets += video.encode(frame)
        packets += video.encode(None)
        if audio is not None and wave is not None:
            fifo_size = audio.codec_context.frame_size or 1024
            channels = audio.codec_context.layout.nb_channels
            for begin in range(0, len(wave), fifo_size):
                piece = np.repeat(wave[None, begin : begin + fifo_size], channels, 0)
                name = audio.codec_context.format.name
                sound = av.AudioFrame.from_ndarray(np.ascontiguousarray(piece), format="fltp", layout=layout)
                sound.sample_rate, sound.time_base = rate, Fraction(1, rate)
                sound.pts = begin + round(audio_late_s * rate)
                if name != "fltp":
                    resampler = av.AudioResampler(format=name, layout=layout, rate=rate)
                    for part in resampler.resample(sound):
                        packets += audio.encode(part)
                else:
                    packets += audio.encode(sound)
            packets += audio.encode(None)
        packets = [
            p for p in packets if p.stream is not audio or not lost_s[0] <= float(p.pts * p.time_base) < lost_s[1]
        ]
        for packet in packets:
            if jitter_s and packet.stream is audio and packet.pts:
                packet.pts = packet.dts = packet.pts + int(jitter.uniform(-jitter_s, jitter_s) / packet.time_base)

        def place(packet: av.Packet) -> float:
            return float(packet.dts * packet.time_base) - (audio_lead_s if packet.stream is audio else 0.0)

        for packet in sorted(packets, key=place):
            container.mux_one(packet) if audio_lead_s else container.mux(packet)
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_a_written_clip_reads_back(tmp_path, suffix):
    frames = counter_frames(40)
    wave = ticks([0.3, 0.9, 1.5], 2.5, 16000)
    path = tmp_path / f"clip{suffix}"
    write_clip(path, Clip(frames, wave, 16.0, 16000))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    back = read_clip(path, fps=16.0, num_frames=40, **GEOMETRY)
    assert back.frames.dtype == np.uint8
    assert back.waveform.dtype == np.float32
    assert counts(back.frames) == list(range(40))
    assert np.abs(back.frames.astype(int) - frames).mean() < 2.0
    assert len(back.waveform) == 40000
    assert np.corrcoef(back.waveform, wave)[0, 1] > 0.995  # one sample of delay would give 0.4


@pytest.mark.parametrize("fps", [8.0, 23.976, 24.0, 29.97])
def test_the_rate_of_a_written_clip_is_exact(tmp_path, fps):
    write_clip(tmp_path / "a.mp4", Clip(counter_frames(12), np.zeros(16000, np.float32), fps, 16000))
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == Fraction(fps).limit_denominator(1001)
    info = probe(tmp_path / "a.mp4")
    assert (info.width, info.height, info.num_frames, info.sample_rate, info.audio_channels) == (64, 32, 12, 16000, 1)
    assert info.has_video
    assert info.has_audio
    assert math.isclose(info.duration_s, 12 / fps, abs_tol=1e-3)


SOURCES = {
    "mp4": (".mp4", ("libx264", "aac"), 44100, {}),
    "mov": (".mov", ("libx264", "aac"), 48000, {}),
    "mkv": (".mkv", ("libx264", "aac"), 44100, {}),
    "webm": (".webm", ("libvpx", "libopus"), 48000, {}),
    "ts": (".ts", ("libx264", "aac"), 48000, {}),
    "mkv_flac": (".mkv", ("ffv1", "flac"), 44100, {}),
}


@pytest.mark.parametrize("start_s", [0.0, 0.52, 2.25])
@pytest.mark.parametrize("fps", [Fraction(25), Fraction(30000, 1001)])
@pytest.mark.parametrize("source", SOURCES)
def test_picture_and_sound_keep_their_times(tmp_path, source, fps, start_s):
    suffix, codecs, rate, options = SOURCES[source]
    at_s = [float(Fraction(n) / fps) for n in range(10, 120, 11)]
    duration_s = float(130 / fps)
    path = write_source(
        tmp_path / f"a{suffix}",
        counter_frames(130),
        fps,
        ticks(at_s, duration_s, rate),
        rate,
        "stereo",
        codecs,
        options=options,
    )
    clip = read_clip(path, fps=24.0, num_frames=36, start_s=start_s, **GEOMETRY)
    expected = [math.floor((start_s + (n + 0.5) / 24) * fps + 1e-9) for n in range(36)]
    assert counts(clip.frames) == expected
    assert len(clip.waveform) == 24000
    within = [t - start_s for t in at_s if 0.1 < t - start_s < 1.4]
    assert len(within) >= 3
    for at in within:
        assert abs(tick_time(clip.waveform, at, 16000) - at) < 1.5e-3


@pytest.mark.parametrize(("video_late_s", "audio_late_s"), [(0.0, 0.4), (0.4, 0.0), (0.3, 0.1)])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_streams_that_start_at_different_times(tmp_path, suffix, video_late_s, audio_late_s):
    # In the file's time, the tick is at 0.9 s + audio_late_s; in the clip's, picture 0 is at 0.
    path = write_source(
        tmp_path / f"a{suffix}",
        counter_frames(75),
        Fraction(25),
        ticks([0.9], 3.5, 44100),
        video_late_s=video_late_s,
        audio_late_s=audio_late_s,
    )
    clip = read_clip(path, fps=25.0, num_frames=50, **GEOMETRY)
    assert counts(clip.frames) == list(range(50))
    at = 0.9 + audio_late_s - video_late_s
    assert abs(tick_time(clip.waveform, at, 16000) - at) < 1.5e-3
    if audio_late_s > video_late_s:
        quiet = clip.waveform[: round((audio_late_s - video_late_s - 0.05) * 16000)]
        assert np.abs(quiet).max() < 1e-3


@pytest.mark.parametrize(("suffix", "lead_s"), [(".mkv", 2.0), (".ts", 1.0), (".mkv", 12.0)])
def test_sound_that_lies_far_ahead_of_its_pictures_is_not_lost(tmp_path, suffix, lead_s):
    """A seek to the pictures lands behind the sound that goes with them."""
    frames, t = counter_frames(100).repeat(4, 0), np.arange(16 * 44100) / 44100
    path = write_source(
        tmp_path / f"a{suffix}",
        frames,
        Fraction(25),
        (0.5 * np.sin(2 * np.pi * 440 * t)).astype(np.float32),
        audio_lead_s=lead_s,
        options={"max_interleave_delta": "1"},
    )
    clip = read_clip(path, fps=25.0, num_frames=50, start_s=12.0, **GEOMETRY)
    assert counts(clip.frames) == [(300 + n) // 4 for n in range(50)]
    assert np.abs(clip.waveform).reshape(-1, 160).max(1).min() > 0.4


def test_timestamps_that_jitter_do_not_tear_sound_and_a_gap_stays_where_it_is(tmp_path):
    rate, t = 48000, np.arange(8 * 48000) / 48000
    wave = (0.5 * np.sin(2 * np.pi * 440 * t)).astype(np.float32)
    sound = {"fps": Fraction(25), "wave": wave, "rate": rate, "layout": "mono", "codecs": ("libx264", "pcm_s16le")}
    path = write_source(tmp_path / "a.mkv", counter_frames(200), **sound, jitter_s=0.005)
    clip = read_clip(path, fps=25.0, num_frames=50, start_s=2.0, **{**GEOMETRY, "sample_rate": rate})
    assert np.abs(np.diff(clip.waveform)).max() < 0.5 * 2 * np.pi * 440 / rate * 1.05
    assert np.abs(clip.waveform).reshape(-1, 480).max(1).min() > 0.4
    # As packets that were lost: PCM has some of 21 ms here.
    write_source(tmp_path / "b.mkv", counter_frames(200), **sound, jitter_s=0.005, lost_s=(3.0, 3.03))
    clip = read_clip(tmp_path / "b.mkv", fps=25.0, num_frames=50, start_s=2.0, **{**GEOMETRY, "sample_rate": rate})
    silent = np.flatnonzero(np.abs(clip.waveform).reshape(-1, 240).max(1) < 1e-3) * 240 / rate + 2.0
    assert len(silent)
    assert 2.97 < silent.min() <= silent.max() < 3.06
    assert np.abs(clip.waveform[round(1.2 * rate) :]).reshape(-1, 480).max(1).min() > 0.4


@pytest.mark.parametrize("packet_s", [0.01, 0.02, 0.0232])
def test_one_lost_packet_of_any_length_is_a_gap_at_its_place(packet_s):
    rate, length = 48000, round(packet_s * 48000)
    sound = Sound(SimpleNamespace(rate=rate), Span(25.0, 50, 32, 32, rate, "reject", "reject", None), 0.0)
    for number in range(40):
        stamped = number * length
        if number == 20:
            continue
        at = sound._placed(stamped, length, 0.001)
        assert at == stamped
        sound.next = at + length


def test_drift_is_followed():
    """A clock that is 0.1 % fast is off by 2 ms after 2 s, and never by much more."""
    rate, length = 48000, 960
    sound = Sound(SimpleNamespace(rate=rate), Span(25.0, 50, 32, 32, rate, "reject", "reject", None), 0.0)
    worst = 0
    for number in range(2000):
        stamped = round(number * length * 1.001)
        at = sound._placed(stamped, length, 0.001)
        worst, sound.next = max(worst, abs(stamped - at)), at + length
    assert 90 < worst < 130


def test_windows_of_a_long_file_follow_each_other(tmp_path):
    path = write_source(tmp_path / "a.mp4", counter_frames(130), Fraction(25), ticks([2.0], 5.2, 48000), 48000)
    windows = list(iter_clips(path, fps=25.0, num_frames=40, stride_s=1.2, **GEOMETRY))
    assert [s for s, _ in windows] == pytest.approx([0.0, 1.2, 2.4, 3.6])
    for start_s, clip in windows:
        assert counts(clip.frames) == [round(start_s * 25) + n for n in range(40)]
    # Overlapping windows hear the same sound, to rounding of the codec's first packets after a seek.
    first, second = windows[0][1].waveform, windows[1][1].waveform
    assert np.abs(first[19200:25000] - second[: 25000 - 19200]).max() < 0.01


def test_variable_rate_is_refused_or_taken_by_its_timestamps(tmp_path):
    times_s = np.cumsum([0.0] + [0.02, 0.06] * 37)[:75].tolist()
    path = write_source(
        tmp_path / "a.mkv", counter_frames(75), Fraction(25), ticks([1.0], 3.2, 48000), 48000, times_s=times_s
    )
    with pytest.raises(MediaError, match="variable_frame_rate=resample") as raised:
        read_clip(path, fps=24.0, num_frames=48, **GEOMETRY)
    assert raised.value.reason == "variable_frame_rate"
    clip = read_clip(path, fps=24.0, num_frames=48, variable_frame_rate="resample", **GEOMETRY)
    centres = (np.arange(48) + 0.5) / 24
    expected = np.searchsorted(times_s, centres, side="right") - 1
    off_tick = np.abs(centres[:, None] - np.array(times_s)).min(1) > 2e-3  # Matroska rounds to 1 ms
    assert off_tick.sum() > 40
    assert (np.array(counts(clip.frames)) == expected)[off_tick].all()


def test_pictures_cover_the_frame_and_keep_their_aspect(tmp_path):
    # A white disc in the middle of a wide picture must come out round, in the middle, at the cropped scale.
    rows, columns = np.mgrid[:96, :192] + 0.5
    disc = (np.hypot(rows - 48, columns - 96) < 36)[None, ..., None] * np.uint8(200) + np.uint8(20)
    frames = np.broadcast_to(disc, (10, 96, 192, 3)).copy()
    frames[:, :, :40], frames[:, :, -40:] = (250, 20, 20), (250, 20, 20)
    path = write_source(tmp_path / "a.mp4", frames, Fraction(25), ticks([0.1], 0.5, 48000), 48000)
    clip = read_clip(path, fps=25.0, num_frames=10, height=48, width=48, sample_rate=16000)
    bright = clip.frames[5].astype(float).mean(-1) > 120
    assert bright.sum() == pytest.approx(math.pi * 18**2, rel=0.04)
    y, x = np.nonzero(bright)
    assert (y.mean(), x.mean()) == pytest.approx((23.5, 23.5), abs=0.3)
    assert abs(np.ptp(y) - np.ptp(x)) <= 1
    red = clip.frames[5].astype(int)
    assert (red[..., 0] - red[..., 1]).max() < 60  # the red margins are cut off


TURNS = {
    "as it is": ((1, 0, 0, 1), lambda p: p),
    "clockwise": ((0, 1, -1, 0), lambda p: np.rot90(p, -1, axes=(1, 2))),
    "half": ((-1, 0, 0, -1), lambda p: np.rot90(p, 2, axes=(1, 2))),
    "anticlockwise": ((0, -1, 1, 0), lambda p: np.rot90(p, 1, axes=(1, 2))),
    "mirrored": ((-1, 0, 0, 1), lambda p: p[:, :, ::-1]),
    "upended": ((1, 0, 0, -1), lambda p: p[:, ::-1]),
    "transposed": ((0, 1, 1, 0), lambda p: p.swapaxes(1, 2)),
    "transposed and turned": ((0, -1, -1, 0), lambda p: p.swapaxes(1, 2)[:, ::-1, ::-1]),
}


@pytest.mark.parametrize("turn", TURNS)
def test_pictures_are_turned_upright(tmp_path, turn):
    """A phone stores pictures as its sensor lies, and a matrix in the track header says how they are shown."""
    (a, b, c, d), shown = TURNS[turn]
    frames = np.full((8, 32, 64, 3), 40, np.uint8)
    frames[:, :16, :32], frames[:, 16:, :32] = (230, 40, 40), (40, 60, 220)
    path = tmp_path / "a.mp4"
    write_clip(path, Clip(frames, np.zeros(16000, np.float32), 8.0, 16000))
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # ISO 14496-12, 8.3.2; the picture's track comes first
    values = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 0x40000000)
    data[matrix : matrix + 36] = b"".join(v.to_bytes(4, "big", signed=True) for v in values)
    path.write_bytes(data)
    expected = shown(frames)
    height, width = expected.shape[1:3]
    clip = read_clip(path, fps=8.0, num_frames=8, height=height, width=width, sample_rate=16000)
    assert np.abs(clip.frames.astype(int) - expected).mean() < 4.0
    assert np.abs(next(iter_pictures(path)).rgb.astype(int) - expected[0]).mean() < 6.0
    assert upright_size(path)[:2] == (height, width)
    cut = Crop(top=2, left=4, height=height - 4, width=width - 8)
    clip = read_clip(path, fps=8.0, num_frames=8, height=height - 4, width=width - 8, sample_rate=16000, crop=cut)
    assert np.abs(clip.frames.astype(int) - expected[:, 2:-2, 4:-4]).mean() < 4.0


@pytest.mark.parametrize("turns", range(4))
def test_side_data_that_pyav_has_no_name_of_is_no_obstacle(turns):
    class Frame:
        rotation = turns * 90 if turns < 3 else -90

        @property
        def side_data(self):
            raise ValueError("31 is not a valid Type")

    picture = np.arange(6).reshape(2, 3)
    assert np.array_equal(Upright.of(Frame())(picture), np.rot90(picture, turns))


@pytest.mark.parametrize("rgb", [(220, 30, 40), (40, 200, 60), (50, 80, 230), (128, 128, 128)])
def test_colours_survive(tmp_path, rgb):
    frames = np.broadcast_to(np.array(rgb, np.uint8), (8, 32, 32, 3)).copy()
    write_clip(tmp_path / "a.mp4", Clip(frames, np.zeros(16000, np.float32), 8.0, 16000))
    back = read_clip(tmp_path / "a.mp4", fps=8.0, num_frames=8, height=32, width=32, sample_rate=16000)
    assert np.abs(back.frames.astype(int) - frames).max() <= 5


def test_mono_is_the_mean_of_equal_channels(tmp_path):
    t = np.arange(48000) / 48000
    wave = (0.5 * np.sin(2 * np.pi * 440 * t)).astype(np.float32)
    for layout in ("mono", "stereo", "5.1"):
        lossless = ("libx264", "flac")
        path = write_source(tmp_path / f"{layout}.mkv", counter_frames(25), Fraction(25), wave, 48000, layout, lossless)
        clip = read_clip(path, fps=25.0, num_frames=25, **GEOMETRY)
        expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
        assert np.abs(clip.waveform - expected)[1000:-1000].max() < 0.02, layout


def reason_of(path: Path, **knobs) -> str:
    with pytest.raises(MediaError) as raised:
        read_clip(path, **{"fps": 25.0, "num_frames": 50, **GEOMETRY, **knobs})
    assert str(path) in str(raised.value)
    copy = pickle.loads(pickle.dumps(raised.value))
    assert (copy.reason, str(copy)) == (raised.value.reason, str(raised.value))
    return raised.value.reason


def test_what_is_missing_or_broken_is_named(tmp_path):
    frames, wave = counter_frames(75), ticks([1.0], 3.0, 48000)
    assert reason_of(write_source(tmp_path / "silent.mp4", frames, Fraction(25), None)) == "no_audio"
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        audio = container.add_stream("aac", rate=48000, layout="mono")
        sound = av.AudioFrame.from_ndarray(wave[None, :48000], format="fltp", layout="mono")
        sound.sample_rate = 48000
        container.mux(audio.encode(sound))
        container.mux(audio.encode(None))
    assert reason_of(tmp_path / "sound.mp4") == "no_video"
    (tmp_path / "noise.mp4").write_bytes(b"no media at all" * 100)
    assert reason_of(tmp_path / "noise.mp4") == "unreadable"
    assert reason_of(tmp_path / "absent.mp4") == "unreadable"
    whole = write_source(tmp_path / "whole.mp4", frames, Fraction(25), wave, 48000)
    assert reason_of(whole, num_frames=80) == "too_short"
    assert reason_of(whole, start_s=1.5) == "too_short"
    assert reason_of(whole, start_s=100.0) == "too_short"
    assert len(read_clip(whole, fps=25.0, num_frames=76, **GEOMETRY).frames) == 76  # one frame may be held
    short_sound = write_source(tmp_path / "half.mp4", frames, Fraction(25), wave[:48000], 48000)
    assert reason_of(short_sound) == "too_short"
    assert len(read_clip(short_sound, fps=25.0, num_frames=25, **GEOMETRY).waveform) == 16000


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_file_cut_off_is_told_from_a_short_one(tmp_path, suffix):
    options = {"movflags": "+faststart"} if suffix == ".mp4" else {}
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (75, 32, 64, 3)).astype(np.uint8)
    wave = rng.normal(0, 0.1, 144000).astype(np.float32)
    whole = write_source(tmp_path / f"whole{suffix}", frames, Fraction(25), wave, 48000, options=options)
    data = whole.read_bytes()
    for share in (0.3, 0.6):
        cut = tmp_path / f"cut{share}{suffix}"
        cut.write_bytes(data[: int(share * len(data))])
        assert reason_of(cut, num_frames=70) == "truncated"


def test_bad_requests_name_the_knob(tmp_path):
    good = Clip(counter_frames(8), np.zeros(8000, np.float32), 16.0, 16000)
    with pytest.raises(OviError, match="even"):
        write_clip(tmp_path / "a.mp4", Clip(good.frames[:, :31], good.waveform, 16.0, 16000))
    with pytest.raises(OviError, match="sample_rate"):
        write_clip(tmp_path / "a.mp4", Clip(good.frames, good.waveform, 16.0, 12345))
    with pytest.raises(OviError, match="uint8"):
        write_clip(tmp_path / "a.mp4", Clip(good.frames.astype(np.float32), good.waveform, 16.0, 16000))
    with pytest.raises(OviError, match=r"\.mp4"):
        write_clip(tmp_path / "a.webm", good)
    assert not list(tmp_path.iterdir())
    write_clip(tmp_path / "a.mp4", good)
    for knob in ({"fps": 0.0}, {"num_frames": 0}, {"start_s": -1.0}, {"variable_frame_rate": "ignore"}):
        with pytest.raises(OviError, match=next(iter(knob))):
            read_clip(tmp_path / "a.mp4", **{"fps": 16.0, "num_frames": 8, **GEOMETRY, **knob})


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, share):
    rng = np.random.default_rng(0)
    old = Clip(counter_frames(8), np.zeros(8000, np.float32), 16.0, 16000)
    new = Clip(rng.integers(0, 255, (8, 32, 64, 3)).astype(np.uint8), np.zeros(8000, np.float32), 16.0, 16000)
    write_clip(tmp_path / "probe.mp4", new)
    size = (tmp_path / "probe.mp4").stat().st_size
    (tmp_path / "probe.mp4").unlink()
    write_clip(tmp_path / "a.mp4", old)
    before = (tmp_path / "a.mp4").read_bytes()
    with full_disk(int(share * size)), pytest.raises(OSError, match=r"a\.mp4"):
        write_clip(tmp_path / "a.mp4", new)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == before


def test_a_real_file(real_clip):
    info = probe(real_clip)
    assert (info.width, info.height, info.fps, info.sample_rate, info.audio_channels) == (1280, 720, 25.0, 48000, 6)
    geometry = {"height": 96, "width": 96, "sample_rate": 16000}
    whole = read_clip(real_clip, fps=25.0, num_frames=125, **geometry)
    later = read_clip(real_clip, fps=25.0, num_frames=50, start_s=2.0, **geometry)
    assert np.array_equal(whole.frames[50:100], later.frames)  # by seeking as by decoding on
    assert np.abs(whole.waveform[32000:64000] - later.waveform).max() < 1e-3
    assert np.abs(whole.waveform).max() > 0.02
    # A middle frame against a resize that shares nothing with ours: Pillow's, averaging boxes.
    with av.open(str(real_clip)) as container:
        frame = next(f for n, f in enumerate(container.decode(video=0)) if n == 60)
    picture = Image.fromarray(frame.to_ndarray(format="rgb24", src_colorspace="ITU709", dst_colorspace="ITU709"))
    square = np.asarray(picture.resize((171, 96), Image.Resampling.BOX))[:, 37:133]
    assert np.abs(whole.frames[60].astype(int) - square).mean() < 3.0
    with pytest.raises(MediaError, match="lower num_frames"):
        read_clip(real_clip, fps=25.0, num_frames=150, **geometry)
