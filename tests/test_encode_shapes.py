"""Sets of several sizes and lengths, of sound alone and of pictures alone: from media files to batches."""

import importlib
import json
import wave
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from ovi.data.encode import encode
from ovi.data.index import ShardIndex
from ovi.data.media import Clip, probe, read_clip, write_clip
from ovi.data.reading.check import check_set
from ovi.data.shards import LatentShards
from ovi.data.sources import ClipFormat, Folder
from ovi.data.stages import borders, loudness, motion, nearest_size, size  # noqa: F401
from ovi.data.stages.base import Candidate
from ovi.data.stages.nearest_size import NearestSize
from ovi.data.stages.windows import Windows
from ovi.errors import OviError
from test_encode import SIZE, codecs, hashes, mux, samples

RATE = 16000


def texture(num_frames, height=32, width=32, seed=0):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 255, (num_frames, height // 8, width // 8, 3), dtype=np.uint8)
    sound = (0.1 * rng.standard_normal(num_frames * 2000)).astype(np.float32)
    return Clip(blocks.repeat(8, 1).repeat(8, 2), sound, 8, RATE)


def write_wav(path, waveform, rate=RATE):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(waveform, -1, 1) * 32767).astype("<i2").tobytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two shapes of picture, spans of several lengths at 8 frames a second, a wav, a film without sound."""
    made = tmp_path_factory.mktemp("mixed")
    write_clip(made / "wide.mp4", texture(16 + 8 + 4 + 2, 32, 64, 1))
    write_clip(made / "tall.mp4", texture(9, 64, 32, 2))
    write_clip(made / "square.mp4", texture(16, 32, 32, 3))
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(3 * RATE) / RATE)
    write_wav(made / "tone.wav", tone)
    mux(made / "silent.mp4", video=True, audio=False)
    return made


MIXED = {"sizes": [[16, 32], [32, 16], [16, 16]], "lengths": [4, 8, 16], "incomplete": "both"}


@pytest.fixture(scope="module")
def mixed(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "set"
    encode(Folder(path=str(folder)), codecs(), out, **SIZE, **MIXED, shard_size=2, val_fraction=0)
    return out


def test_each_clip_has_the_length_and_size_that_fit_it(mixed):
    index = ShardIndex.load(mixed)
    found = {about["file"]: [] for _, about in samples(mixed).values()}
    for tensors, about in samples(mixed).values():
        shapes = {name: tuple(tensors[name].shape) for name in ("video", "audio") if name in tensors}
        found[about["file"]].append((about["start_s"], about["duration_s"], shapes))
    video, audio = index.latent_shapes["video"], index.latent_shapes["audio"]
    assert (video, audio) == ((12, 8, 2, 2), (31, 64))

    def shapes(frames, height, width):
        made = {"audio": (RATE * frames // 8 // 512, 64)}
        return made | ({"video": (12, frames, height // 8, width // 8)} if height else {})

    assert found == {
        "wide.mp4": [(0.0, 2.0, shapes(16, 16, 32)), (2.0, 1.0, shapes(8, 16, 32)), (3.0, 0.5, shapes(4, 16, 32))],
        "tall.mp4": [(0.0, 1.0, shapes(8, 32, 16))],
        "square.mp4": [(0.0, 2.0, shapes(16, 16, 16))],
        "tone.wav": [(0.0, 2.0, shapes(16, 0, 0)), (2.0, 1.0, shapes(8, 0, 0))],
        "silent.mp4": [(0.0, 1.0, {"video": (12, 8, 2, 2)}), (1.0, 0.5, {"video": (12, 4, 2, 2)})],
    }


def test_shards_are_of_one_shape_and_read_back(mixed):
    index = ShardIndex.load(mixed)
    assert check_set(index).all_findings == []
    dataset = LatentShards(index, "train")
    kinds = {str(shard.shapes) for shard in dataset.shards}
    assert len(kinds) == len(dataset.shards) == 9
    number = 0
    for shard in dataset.shards:
        batch = dataset.read_batch(range(number, number + shard.num_samples)).unpack()
        assert tuple(batch.video.shape[1:]), tuple(batch.audio.shape[1:]) == (shard.shapes.video, shard.shapes.audio)
        number += shard.num_samples
    written = json.loads((mixed / "index.json").read_text())
    assert written["settings"]["lengths"] == [4, 8, 16]
    assert set(written["throughput"]["steps"]) >= {"windows", "read", "video codec", "audio codec", "text", "write"}
    assert written["throughput"]["steps"]["video codec"]["clips"] == 7


def test_sound_alone_is_the_files_sound_and_statistics_are_of_all_kinds(mixed, folder):
    mine = ShardIndex.load(mixed).codecs()
    tensors, _ = next(s for s in samples(mixed).values() if s[1]["file"] == "tone.wav" and s[1]["start_s"] == 2.0)
    with wave.open(str(folder / "tone.wav")) as file:
        pcm = np.frombuffer(file.readframes(10**9), "<i2").astype(np.float32) / 32768
    _, audio = mine.encode_clips(
        torch.zeros(1, 8, 0, 0, 3, dtype=torch.uint8), torch.from_numpy(pcm[None, 32000:48000])
    )
    torch.testing.assert_close(tensors["audio"].float(), audio[0], atol=2e-3, rtol=0)
    latents = [tensors["audio"].float() for tensors, _ in samples(mixed).values() if "audio" in tensors]
    assert torch.cat(latents).std() == pytest.approx(1, abs=0.1)  # fitted on the wav too
    video = [tensors["video"].float().flatten() for tensors, _ in samples(mixed).values() if "video" in tensors]
    assert torch.cat(video).std() == pytest.approx(1, abs=0.1)


@pytest.mark.slow
def test_processes_make_the_same_set(folder, mixed, tmp_path):
    source = Folder(path=str(folder))
    encode(source, codecs(), tmp_path / "w", **SIZE, **MIXED, shard_size=2, val_fraction=0, num_workers=2)
    assert hashes(tmp_path / "w") == hashes(mixed)


def test_eight_bits_take_both_kinds(folder, tmp_path):
    encode(Folder(path=str(folder)), codecs(), tmp_path, **SIZE, **MIXED, val_fraction=0, dtype="int8")
    index = ShardIndex.load(tmp_path)
    assert set(index.content["quantisation"]) == {"video_rel_rms", "audio_rel_rms"}
    assert check_set(index).all_findings == []


def test_the_sets_own_size_and_length_said_twice_change_nothing(folder, tmp_path):
    source = Folder(path=str(folder))
    encode(source, codecs(), tmp_path / "a", **SIZE)
    encode(source, codecs(), tmp_path / "b", **SIZE, sizes=[[16, 16]], lengths=[8])
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "a" / "rejected.jsonl").read_text().splitlines()]
    assert reasons == ["no_audio"]


@pytest.mark.parametrize(("keep", "files"), [("audio", {"tone.wav"}), ("video", {"silent.mp4"})])
def test_only_the_kind_asked_for_is_kept(keep, files, folder, tmp_path):
    encode(Folder(path=str(folder)), codecs(), tmp_path, **SIZE, incomplete=keep, val_fraction=0)
    incomplete = {about["file"] for tensors, about in samples(tmp_path).values() if len(tensors) < 3}
    assert incomplete == files
    lines = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in lines] == (["no_audio"] if keep == "audio" else [])


def test_stages_pass_by_what_they_cannot_measure(folder, tmp_path):
    importlib.import_module("ovi.data.stages.probe")
    stages = {
        name: {"name": name, "knobs": knobs}
        for name, knobs in {
            "probe": {"picture": False, "sound": False},
            "size": {"min_height": 8},
            "borders": {},
            "motion": {"low": None},
            "loudness": {"min_db": None},
        }.items()
    }
    encode(Folder(path=str(folder)), codecs(), tmp_path, **SIZE, incomplete="both", stages=stages, val_fraction=0)
    figures = {about["file"]: about["figures"] for _, about in samples(tmp_path).values()}
    assert {"motion", "height", "border_share"} & set(figures["tone.wav"]) == set()
    assert "loudness_db" in figures["tone.wav"]
    assert "loudness_db" not in figures["silent.mp4"]
    assert {"motion", "height", "border_share"} <= set(figures["silent.mp4"])
    assert {"motion", "height", "loudness_db"} <= set(figures["square.mp4"])


def test_a_set_of_sound_alone(tmp_path):
    (tmp_path / "in").mkdir()
    for n in range(3):
        write_wav(tmp_path / "in" / f"{n}.wav", 0.1 * np.random.default_rng(n).standard_normal(RATE))
    source = Folder(path=str(tmp_path / "in"))
    with pytest.raises(OviError, match=r"no \.mp4"):
        encode(source, codecs(), tmp_path / "out", **SIZE)
    for _ in range(2):
        summary = encode(source, codecs(), tmp_path / "out", **SIZE, incomplete="audio", val_fraction=0)
    assert (summary.num_samples["train"], summary.num_new) == (3, 0)
    assert check_set(ShardIndex.load(tmp_path / "out")).all_findings == []


def test_statistics_of_a_set_of_sound_alone_are_kept_where_pictures_come_to_it(folder, tmp_path):
    (tmp_path / "in").mkdir()
    write_wav(tmp_path / "in" / "noise.wav", 0.1 * np.random.default_rng(0).standard_normal(RATE))
    encode(Folder(path=str(tmp_path / "in")), codecs(), tmp_path / "sound", **SIZE, incomplete="audio")
    sound = ShardIndex.load(tmp_path / "sound")
    for _ in range(2):  # the second finds the first's statistics
        encode(Folder(path=str(folder)), sound.codecs(), tmp_path / "both", **SIZE, val_fraction=0)
    both = ShardIndex.load(tmp_path / "both")
    states = [index.content["codecs"]["state"] for index in (sound, both)]
    assert [state["video"]["fitted"] for state in states] == [False, True]
    assert states[0]["audio"] == states[1]["audio"]
    assert both.differences(sound) == []
    assert sound.differences(both) == ["the first has no statistics of video latents: name the other one first"]


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({"sizes": [[16, 20]]}, r"sizes: 16x20 .* nearest height and width that do are 16 and 16"),
        ({"sizes": [16, 20]}, "pairs"),
        ({"lengths": []}, "list of frames, or min, max and step"),
        ({"lengths": {"min": 4, "max": 8}}, "min, max and step"),
        ({"incomplete": "yes"}, "reject, audio, video, both, got 'yes'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        (
            {"lengths": [8, 16], "stages": {"w": {"name": "windows", "knobs": {"stride_s": 0.5}}}},
            "stride_s=0.5 with clips of 2 lengths",
        ),
        ({"lengths": [8], "stages": {"w": {"name": "windows", "knobs": {"lengths": [4]}}}}, r"lengths=\[8\], but"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_written(knobs, expected, folder, tmp_path):
    with pytest.raises(OviError, match=expected):
        encode(Folder(path=str(folder)), codecs(), tmp_path / "out", **SIZE, **knobs)
    assert not (tmp_path / "out").exists()


def test_lengths_that_do_not_fit_are_named_with_the_nearest():
    from ovi.clock import Clock
    from ovi.data.forms import Forms

    class Published:
        clock = Clock()

        def latent_shapes(self, num_frames, height, width):
            self.clock.lengths(num_frames)

    with pytest.raises(OviError, match=r"lengths: 24, 120 frames do not fit .* that do are 25, 121"):
        Forms.of(Published(), 121, 704, 704, lengths=[24, 25, 120])
    every = Forms.of(Published(), 121, 704, 704, lengths={"min": 25, "max": 121, "step": 4})
    assert every.lengths == tuple(4 * n + 1 for n in range(6, 31))


FORM = ClipFormat(8, 8, 16, 16, RATE)


@pytest.mark.parametrize(
    ("span_s", "knobs", "expected"),
    [
        (0.4, {}, []),
        (0.5, {}, [(0, 4)]),
        (3.625, {}, [(0, 16), (2, 8), (3, 4)]),
        (3.625, {"remainder": "overlap"}, [(0, 16), (2, 8), (3, 4)]),
        (3.75, {"remainder": "overlap"}, [(0, 16), (2, 8), (3, 4), (3.25, 4)]),
        (9.0, {"max_clips": 2}, [(0, 16), (2, 16)]),
    ],
)
def test_windows_cut_the_longest_first(span_s, knobs, expected):
    assert Windows(FORM, lengths=[16, 4, 8], **knobs).clips(span_s) == expected


@pytest.mark.parametrize(
    ("aspect", "expected"),
    [(2.1, (16, 32)), (0.4, (32, 16)), (1.1, (16, 16)), (2**0.5, (16, 32)), (0.5**0.5, (32, 16))],
)
def test_the_nearest_size_is_by_the_logarithm_and_the_first_of_two(aspect, expected):
    assert NearestSize(sizes=[(16, 32), (32, 16), (16, 16)]).nearest(aspect) == expected


def test_the_size_is_that_of_the_picture_as_it_is_seen(tmp_path):
    """Square pixels of 32 x 32, shown twice as wide, then cropped to a quarter of their height."""
    from ovi.data.media import Crop

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        for _ in range(8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    stage = NearestSize(sizes=[(16, 16), (16, 32), (16, 128)])
    candidate = Candidate(tmp_path / "a.mp4", "a", form=FORM)
    assert stage.judge(candidate).form == ClipFormat(8, 8, 16, 32, RATE)
    cropped = Candidate(tmp_path / "a.mp4", "a", form=FORM, crop=Crop(0, 0, 8, 32))
    assert stage.judge(cropped).form == ClipFormat(8, 8, 16, 128, RATE)


# --- files without a length, sound far into a file -------------------------------------------------------------------


def test_a_film_written_live_is_as_long_as_its_packets_say(tmp_path):
    path = tmp_path / "live.webm"
    with av.open(str(path), "w", options={"live": "1"}) as container:
        picture = container.add_stream("libvpx", rate=8)
        picture.width = picture.height = 32
        picture.pix_fmt = "yuv420p"
        sound = container.add_stream("libopus", rate=48000, layout="mono")
        for n in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 * n, np.uint8), format="rgb24")
            frame.pts, frame.time_base = n, Fraction(1, 8)
            container.mux(picture.encode(frame))
        wave_ = 0.1 * np.random.default_rng(0).standard_normal((1, 120000)).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(wave_, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 48000, 0
        container.mux(sound.encode(frame))
        container.mux([*sound.encode(None), *picture.encode(None)])
    with av.open(str(path)) as container:
        assert not container.duration
        assert not any(stream.duration for stream in container.streams)
    assert probe(path).duration_s == pytest.approx(2.5, abs=0.05)
    (candidate,) = Windows(FORM, lengths=[16])([Candidate(path, "live")], pytest.fail)
    assert candidate.decoded().clip.frames.shape == (16, 16, 16, 3)


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "m4a"])
def test_sound_is_read_from_where_it_is(suffix, tmp_path):
    """A beep each second from the fifteenth on; noise before makes the mp3's bit rate vary."""
    rate, seconds = 16000, 40
    rng = np.random.default_rng(0)
    sound = 0.2 * rng.standard_normal(rate * seconds) * (np.arange(rate * seconds) < 12 * rate)
    for n in range(15, seconds):
        sound[n * rate : n * rate + 800] = 0.9 * np.sin(2 * np.pi * 1000 * np.arange(800) / rate) * n / seconds
    path = tmp_path / f"a.{suffix}"
    write_wav(tmp_path / "a.wav", sound)
    if suffix != "wav":
        codec = {"flac": "flac", "mp3": "libmp3lame", "m4a": "aac"}[suffix]
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=rate, layout="mono")
            if suffix == "mp3":
                stream.codec_context.options = {"qscale": "4"}
            kind = "s16" if suffix == "flac" else "s16p" if suffix == "mp3" else "fltp"
            values = sound.astype(np.float32) if suffix == "m4a" else (sound * 32767).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(values[None]), format=kind, layout="mono")
            frame.sample_rate, frame.pts = rate, 0
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    clip = read_clip(path, fps=8, num_frames=16, height=0, width=0, sample_rate=rate, start_s=29.5)
    assert clip.frames.shape == (16, 0, 0, 3)
    assert len(clip.waveform) == 2 * rate
    loud = np.flatnonzero(np.abs(clip.waveform) > 0.3)
    starts = loud[np.flatnonzero(np.diff(loud, prepend=-rate) > rate // 4)]
    assert starts / rate == pytest.approx([0.5, 1.5], abs=0.08 if suffix in ("mp3", "m4a") else 2e-3)
