"""What every stage promises: lazy, in order, nothing lost, nothing raised; over planted candidates and broken files."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ovi.data.media import Clip, write_clip
from ovi.data.sources import ClipFormat, Folder
from ovi.data.stages.base import STAGES, Candidate, Filter, Limit, Rejected, limits_of, run_stages
from ovi.data.stages.borders import Borders
from ovi.data.stages.captions import Captions
from ovi.data.stages.duplicates import Duplicates
from ovi.data.stages.loudness import Loudness, Silence
from ovi.data.stages.motion import Motion
from ovi.data.stages.probe import Probe
from ovi.data.stages.size import Size
from ovi.data.stages.stillness import Stillness
from ovi.data.stages.sync import Sync
from ovi.data.stages.windows import Windows
from ovi.data.synthetic import synthetic_clip
from ovi.errors import OviError

FORM = ClipFormat(fps=12, num_frames=12, height=32, width=32, sample_rate=16000)


class Odd(Filter):
    """Keeps even numbers."""

    name = "odd"
    limits = (Limit("odd", "odd_number", "odd.high", high=0.5),)

    def judge(self, candidate):
        return self.within_limits(candidate.with_figures({"odd": int(candidate.key) % 2}))


def numbers(count):
    return [Candidate(Path(f"{n}.mp4"), str(n), f"{n}.mp4") for n in range(count)]


def test_a_chain_pulls_one_candidate_at_a_time():
    pulled = []

    def source():
        for candidate in numbers(1000):
            pulled.append(candidate.key)
            yield candidate

    rejected: list[Rejected] = []
    stream = run_stages({"a": Odd(), "off": None, "b": Odd()}, source(), rejected.append)
    assert pulled == []
    assert [next(stream).key for _ in range(3)] == ["0", "2", "4"]
    assert pulled == ["0", "1", "2", "3", "4"]
    assert [r.candidate.key for r in rejected] == ["1", "3"]


def test_figures_are_written_whether_rejected_or_not():
    rejected: list[Rejected] = []
    kept = list(run_stages({"a": Odd()}, numbers(4), rejected.append))
    assert [c.figures for c in kept] == [{"odd": 0.0}] * 2
    assert [r.figures for r in rejected] == [{"odd": 1.0}] * 2
    assert rejected[0].record() == {
        "file": "1.mp4",
        "start_s": 0.0,
        "reason": "odd_number",
        "message": "1.mp4: odd is 1, odd.high asks for at most 0.5",
        "stage": "odd",
        "figure": "odd",
        "value": 1.0,
        "threshold": 0.5,
        "duration_s": None,
        "key": "1",
        "figures": {"odd": 1.0},
    }
    assert limits_of({"a": Odd(), "off": None}) == {"odd": [0.5]}


def test_records_are_strict_json_even_with_figures_that_are_no_numbers():
    candidate = numbers(1)[0].with_figures({"offset_ms": math.nan, "level": -math.inf, "motion": np.float32(0.5)})
    record = json.loads(json.dumps(candidate.record(), allow_nan=False))
    assert record["figures"] == {"offset_ms": None, "level": None, "motion": 0.5}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"motion": Motion(), "probe": Probe()}, "stage probe looks at files and must come before motion"),
        ({"duplicates": Duplicates(), "windows": Windows(FORM)}, "windows looks at files and must come before duplic"),
        ({"windows": STAGES["windows"]}, "stage windows: expected a Stage or null, got .*; call it on its wiring"),
    ],
)
def test_an_order_that_cannot_work_is_refused_before_anything_runs(stages, message):
    with pytest.raises(OviError, match=message):
        run_stages(stages, numbers(1), list().append)


def test_a_clip_stage_without_windows_says_what_is_missing():
    with pytest.raises(OviError, match="put the stage windows before it"):
        list(run_stages({"motion": Motion()}, numbers(1), list().append))


@pytest.mark.parametrize("name", sorted(STAGES))
def test_registered_stages_go_by_their_registered_name(name):
    assert STAGES[name].name == name


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Every kind of broken file beside two good ones, under names with spaces and unicode."""
    root = tmp_path_factory.mktemp("all kinds") / "Ünïcode ordner 视频"
    root.mkdir()
    made = synthetic_clip(0, seed=1, fps=12, num_frames=24, height=32, width=32, sample_rate=16000).clip
    write_clip(root / "good clip.mp4", made)
    other = synthetic_clip(1, seed=1, fps=12, num_frames=24, height=32, width=32, sample_rate=16000).clip
    write_clip(root / "добро 好 🎬.mkv", other)
    whole = (root / "good clip.mp4").read_bytes()
    (root / "empty.mp4").write_bytes(b"")
    (root / "text.mp4").write_text("not a film\n" * 100)
    (root / "noise.webm").write_bytes(np.random.default_rng(0).bytes(50_000))
    (root / "cut off head.mp4").write_bytes(whole[len(whole) // 2 :])
    matroska = (root / "добро 好 🎬.mkv").read_bytes()
    (root / "cut off tail.mkv").write_bytes(matroska[: len(matroska) // 2])
    damaged = bytearray(whole)
    at = len(damaged) // 3
    damaged[at : at + 3000] = np.random.default_rng(1).bytes(3000)
    (root / "damaged middle.mp4").write_bytes(bytes(damaged))
    short = Clip(made.frames[:4], made.waveform[:5333], 12, 16000)
    write_clip(root / "too short.mp4", short)
    (root / "dangling.mp4").symlink_to(root / "gone.mp4")
    _write_lone(root / "no sound.mp4", made, picture=True)
    _write_lone(root / "no picture.mp4", made, picture=False)
    return root


def _write_lone(path: Path, clip: Clip, *, picture: bool) -> None:
    import av

    with av.open(str(path), "w") as container:
        if picture:
            video = container.add_stream("libx264", rate=12)
            video.height, video.width, video.pix_fmt = 32, 32, "yuv420p"
            for frame in clip.frames:
                container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(video.encode(None))
        else:
            audio = container.add_stream("aac", rate=16000, layout="mono")
            for at in range(0, len(clip.waveform) - 1023, 1024):
                piece = av.AudioFrame.from_ndarray(clip.waveform[None, at : at + 1024], format="fltp", layout="mono")
                piece.sample_rate, piece.pts = 16000, at
                container.mux(audio.encode(piece))
            container.mux(audio.encode(None))


def all_stages() -> dict:
    return {
        "probe": Probe(),
        "borders": Borders(),
        "size": Size(min_height=16),
        "windows": Windows(FORM),
        "stillness": Stillness(max_frozen_s=None, max_share=None),
        "motion": Motion(low=None),
        "loudness": Loudness(min_db=None),
        "silence": Silence(max_share=None),
        "sync": Sync(lambda frames, wave, fps, rate: (0.0, 1.0)),
        "duplicates": Duplicates(),
        "captions": Captions(),
    }


def test_every_kind_of_broken_file_is_rejected_with_a_reason_and_nothing_raises(folder):
    items = Folder(path=str(folder)).items(FORM)
    rejected: list[Rejected] = []
    kept = list(run_stages(all_stages(), map(Candidate.of, items), rejected.append))
    files = Counter(c.file for c in kept)
    assert files["good clip.mp4"] == files["добро 好 🎬.mkv"] == 2
    assert {f for f in files if f not in ("good clip.mp4", "добро 好 🎬.mkv")} <= {
        "cut off tail.mkv",
        "damaged middle.mp4",
    }
    why = {r.candidate.file: r.reason for r in rejected}
    assert why["empty.mp4"] == why["text.mp4"] == why["noise.webm"] == why["dangling.mp4"] == "unreadable"
    assert why["cut off head.mp4"] == "unreadable"
    assert why["too short.mp4"] == "too_short"
    assert why["no sound.mp4"] == "no_audio"
    assert why["no picture.mp4"] == "no_video"
    assert {item.file for item in items} == set(files) | set(why), "every file is kept or accounted for"
    json.dumps([r.record() for r in rejected] + [c.record() for c in kept], allow_nan=False)
    assert all(r.candidate.clip is None for r in rejected)


@pytest.mark.parametrize("name", ["probe", "borders", "size", "windows"])
def test_each_file_stage_alone_survives_the_broken_files(folder, name):
    items = Folder(path=str(folder)).items(FORM)
    rejected: list[Rejected] = []
    kept = list(all_stages()[name](map(Candidate.of, items), rejected.append))
    assert {c.file for c in kept} | {r.candidate.file for r in rejected} == {item.file for item in items}
    assert {"empty.mp4", "text.mp4", "noise.webm", "dangling.mp4"} <= {r.candidate.file for r in rejected}
    assert all(r.stage == name and r.message for r in rejected)


def test_windows_cut_what_fits():
    def starts(span_s, **knobs):
        return [round(s, 6) for s in Windows(FORM, **knobs).starts_s(span_s)]

    assert starts(0.9) == []
    assert starts(1.0) == [0.0]
    assert starts(0.99995) == [0.0], "rounded timestamps must not lose a clip"
    assert starts(3.5) == [0.0, 1.0, 2.0]
    assert starts(3.5, stride_s=0.5) == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert starts(3.5, remainder="overlap") == [0.0, 1.0, 2.0, 2.5]
    assert starts(3.0, remainder="overlap") == [0.0, 1.0, 2.0]
    assert starts(3.5, max_clips=2) == [0.0, 1.0]
    published = ClipFormat(fps=24, num_frames=121, height=8, width=8, sample_rate=16000)
    assert len(Windows(published).starts_s(10 * 121 / 24)) == 10
    for knobs in ({"stride_s": 0.0}, {"remainder": "pad"}, {"max_clips": 0}):
        with pytest.raises(OviError, match=next(iter(knobs))):
            Windows(FORM, **knobs)


def test_probe_and_size_measure_the_real_file(real_clip):
    candidate = Candidate(real_clip, "bunny")
    rejected: list[Rejected] = []
    stages = {"probe": Probe(min_s=5, max_fps=30, min_sample_rate=44100), "size": Size(min_height=720, max_aspect=1.8)}
    (kept,) = run_stages(stages, [candidate], rejected.append)
    assert kept.figures["fps"] == 25
    assert kept.figures["sample_rate"] == 48000
    assert kept.figures["file_s"] == pytest.approx(5.28, abs=0.05)
    assert (kept.figures["height"], kept.figures["width"]) == (720, 1280)
    assert kept.figures["aspect"] == pytest.approx(16 / 9)
    for stage, reason, threshold in [
        (Probe(min_s=6), "too_short", 6),
        (Probe(max_s=5), "too_long", 5),
        (Probe(min_fps=29), "slow_frame_rate", 29),
        (Probe(max_fps=24), "fast_frame_rate", 24),
        (Probe(min_sample_rate=96000), "low_sample_rate", 96000),
        (Size(min_width=1281), "small", 1281),
        (Size(max_aspect=1.7), "wide", 1.7),
        (Size(min_aspect=2.0), "narrow", 2.0),
    ]:
        assert list(stage([candidate], rejected.append)) == []
        assert (rejected[-1].reason, rejected[-1].threshold) == (reason, threshold)


def test_captions_are_checked_and_rewritten():
    def one(text, **knobs):
        rejected: list[Rejected] = []
        kept = list(Captions(**knobs)([Candidate(Path("a.mp4"), "a", caption=text)], rejected.append))
        return kept[0].caption if kept else rejected[0].reason

    text = "A man says <S>Hi there<E>. <AUDCAP>A calm voice.<ENDAUDCAP>"
    assert one(text) == text
    assert one(text, variant="audio") == "A man says <S>Hi there<E>. Audio: A calm voice."
    assert one("A man says <S>Hi") == "caption_unbalanced"
    assert one("", required=True) == "no_caption"
    assert one("A man waves.", audio_required=True) == "no_audio_caption"
    assert one("A man waves.", min_words=4) == "short_caption"
    assert one("A man waves.", max_words=2) == "long_caption"
    with pytest.raises(OviError, match=r"captions\.variant must be one of audcap, audio"):
        Captions(variant="other")
