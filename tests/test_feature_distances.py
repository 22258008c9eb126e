"""Distances of clips over the features of small networks made here: protocols, tags, halves, processes, bad input."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from ovi.errors import OviError
from ovi.metrics.clip_metric import METRICS
from ovi.metrics.fad import FrechetAudioDistance
from ovi.metrics.features.base import AUDIO_FEATURES, VIDEO_FEATURES, AudioExtractor, VideoExtractor
from ovi.metrics.frechet import frechet_distance_of
from ovi.metrics.fvd import FrechetVideoDistance, VideoProtocol, select_frames
from ovi.metrics.inception import inception_score, kl_divergence
from ovi.metrics.kernel import kernel_audio_distance, kernel_distance
from ovi.metrics.sound import is_silent, resampled
from ovi.registry import UnknownNameError

FPS, RATE = 8.0, 16000


class SmallVideo(VideoExtractor):
    """Four fixed mixtures of the first and the last frame's corner pixels."""

    feature_dim = 4
    num_frames = 3
    resolution = (2, 2)
    digest = "0"

    def __init__(self, *, name: str = "small", spoil: bool = False) -> None:
        super().__init__()
        self.name, self.spoil = name, spoil
        self.register_buffer("mix", torch.from_numpy(np.random.default_rng(0).normal(size=(24, 4))).float())
        self.freeze()

    def forward(self, frames: Tensor) -> Tensor:
        ends = frames[:, [0, -1], :2, :2].flatten(1).float() / 255
        return ends @ self.mix + (math.nan if self.spoil else 0.0)


class SmallSound(AudioExtractor):
    """Level in four bands of each quarter of a second at 8 kHz; their sums over time, as logits of four classes."""

    name = "ears"
    feature_dim = 4
    sample_rate = 8000
    has_classes = True
    digest = "1"

    def __init__(self, *, classes: bool = True) -> None:
        super().__init__()
        self.has_classes = classes
        self.freeze()

    def forward(self, waveform: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(waveform.unfold(0, 2000, 2000)).abs()
        return torch.stack([band.mean(1) for band in spectrum.tensor_split(4, 1)], 1)

    def logits(self, waveform: Tensor) -> Tensor:
        return self(waveform).sum(0)


@contextmanager
def small_networks() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(VIDEO_FEATURES.temporary("small", SmallVideo))
        stack.enter_context(AUDIO_FEATURES.temporary("ears", SmallSound))
        yield


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with small_networks():
        yield


def pictures(number: int, seed: int = 0, brighter: float = 0.0, frames: int = 8) -> np.ndarray:
    rng = np.random.default_rng([seed, number])
    return (rng.uniform(0, 180, (frames, 4, 4, 3)) + brighter).astype(np.uint8)


def sound(number: int, seed: int = 0, louder: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng([seed, number, 1])
    tone = np.sin(2 * np.pi * rng.uniform(200, 3500) * np.arange(RATE) / RATE)
    return (louder * rng.uniform(0.05, 0.2) * tone + rng.normal(0, 0.01, RATE)).astype(np.float32)


def fvd(**knobs) -> FrechetVideoDistance:
    return FrechetVideoDistance(FPS, RATE, **{"features": "small", **knobs})


def fad(**knobs) -> FrechetAudioDistance:
    return FrechetAudioDistance(FPS, RATE, **{"features": "ears", **knobs})


def fill(metric, generated=range(12), real=range(15), *, counterparts: bool = False, **changed):
    """Generated clips of seed 1 and real ones of seed 2, the generated ones brighter and louder."""
    for n in real:
        metric.update(pictures(n, 2), sound(n, 2), number=n, real=True)
    for n in generated:
        seen, heard = pictures(n, 1, brighter=40), sound(n, 1, louder=1.5)
        more = {"real_waveform": sound(n, 2)} if counterparts else {}
        metric.update(changed.get("frames", seen), changed.get("waveform", heard), number=n, **more)
    return metric


def seen(numbers, seed, brighter=0.0) -> Tensor:
    """Their features, without any of the machinery."""
    network = SmallVideo()
    return torch.cat([network(torch.from_numpy(pictures(n, seed, brighter)[None, :3])) for n in numbers])


def heard(numbers, seed, louder=1.0) -> Tensor:
    network = SmallSound()
    return torch.cat([network(torch.from_numpy(resampled(sound(n, seed, louder), RATE, 8000))) for n in numbers])


def floats(figures: dict[str, Tensor]) -> dict[str, float]:
    assert all(value.ndim == 0 for value in figures.values())
    return {tag: float(value) for tag, value in figures.items()}


# --- pictures -----------------------------------------------------------------------------------------------------


def test_pictures_give_the_distances_of_their_features():
    found = floats(fill(fvd()).compute())
    generated, real = seen(range(12), 1, 40), seen(range(15), 2)
    assert found == {
        "fd_small_3f": pytest.approx(float(frechet_distance_of(generated, real)), rel=1e-9),
        "fd_small_3f_n": 12,
        "fd_small_3f_n_real": 15,
        "kd_small_3f": pytest.approx(float(kernel_distance(generated, real)), rel=1e-9),
        "kd_small_3f_n": 12,
        "kd_small_3f_n_real": 15,
    }
    unbiased = floats(fill(fvd(covariance="unbiased", kernel=False)).compute())
    expected = float(frechet_distance_of(generated, real, unbiased=True))
    assert unbiased == {
        "fd_small_3f_unbiased": pytest.approx(expected, rel=1e-9),
        "fd_small_3f_unbiased_n": 12,
        "fd_small_3f_unbiased_n_real": 15,
    }


def test_the_floor_is_one_half_of_the_real_clips_against_the_other():
    even, odd = seen(range(0, 15, 2), 2), seen(range(1, 15, 2), 2)
    assert floats(fill(fvd()).floor()) == {
        "fd_small_3f": pytest.approx(float(frechet_distance_of(even, odd)), rel=1e-9),
        "fd_small_3f_n": 8,
        "fd_small_3f_n_real": 7,
        "kd_small_3f": pytest.approx(float(kernel_distance(even, odd)), rel=1e-9),
        "kd_small_3f_n": 8,
        "kd_small_3f_n_real": 7,
    }


def test_without_two_clips_a_half_there_is_no_floor_but_a_figure():
    metric = fill(fvd(), real=range(3))
    assert floats(metric.floor()) == {"fd_small_3f_n": 2, "fd_small_3f_n_real": 1}
    assert math.isfinite(metric.compute()["fd_small_3f"])


def test_only_the_standard_network_has_the_name_of_fvd():
    def tag(**knobs):
        return fvd(**knobs).tag

    assert tag() == "fd_small_3f"
    with VIDEO_FEATURES.temporary("i3d_here", lambda: SmallVideo(name="i3d")):
        assert tag(features="i3d_here", num_frames=16) == "fvd_i3d_16f"
        assert tag(features="i3d_here", num_frames=16, stride=2, covariance="unbiased") == "fvd_i3d_16f_s2_unbiased"
        assert fvd(features="i3d_here", num_frames=16, stride=2).kernel_tag == "kd_i3d_16f_s2"
    assert tag(stride=2, windows="all", fps_at=4) == "fd_small_3f_s2_4fps_all"


def test_networks_are_chosen_by_name_with_their_knobs():
    metric = METRICS.build({"name": "fvd", "knobs": {"features": {"name": "small", "spoil": True}}}, FPS, RATE)
    with pytest.raises(OviError, match="fd_small_3f: clip 5: 1 of 1 features hold NaN"):
        metric.update(pictures(5), sound(5), number=5)
    with pytest.raises(UnknownNameError, match="smal"):
        fvd(features="smal")
    with pytest.raises(UnknownNameError, match="no knob deep"):
        fvd(features={"name": "small", "deep": 3})


def test_a_network_that_breaks_its_word_is_told():
    metric = fvd()
    metric.extractor.mix = torch.zeros(24, 5)
    with pytest.raises(OviError, match="small gave 5 features a window, its feature_dim says 4"):
        fill(metric)


def test_protocols_choose_frames():
    frames = np.arange(40, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)

    def chosen(fps=None, **protocol):
        return select_frames(frames, VideoProtocol(**protocol), fps=fps)[..., 0, 0, 0].tolist()

    assert chosen() == [list(range(16))]
    assert chosen(num_frames=4, stride=3) == [[0, 3, 6, 9]]
    assert chosen(windows="all") == [list(range(16)), list(range(16, 32))]
    assert chosen(num_frames=14, stride=3) == [list(range(0, 40, 3))]
    assert chosen(num_frames=7, stride=3, windows="all") == [list(range(0, 21, 3)), list(range(21, 40, 3))]
    assert chosen(fps=24, fps_at=8, num_frames=4) == [[1, 4, 7, 10]]
    assert chosen(fps=24, fps_at=16, num_frames=5) == [[0, 2, 3, 5, 6]]
    assert chosen(fps=24, fps_at=24, num_frames=5) == chosen(num_frames=5)


def test_bad_protocols_are_refused():
    with pytest.raises(OviError, match=r"spans 17 frames \(num_frames=9, stride=2\), the clip has 8"):
        fill(fvd(num_frames=9, stride=2))
    with pytest.raises(OviError, match=r"spans 3 frames \(num_frames=3, stride=1, fps_at=2\), the clip has 2"):
        fill(fvd(fps_at=2))
    with pytest.raises(OviError, match="fps_at=25 must be at most the clips' frame rate, which is 8"):
        fvd(fps_at=25)
    for wrong in ({"covariance": "both"}, {"windows": "last"}, {"num_frames": 0}, {"stride": 0}, {"fps_at": -1}):
        with pytest.raises(OviError, match=next(iter(wrong))):
            fvd(**wrong)
    with pytest.raises(OviError, match="max_samples must be 2 or more"):
        fvd(max_samples=1)


def test_all_windows_of_a_clip_count():
    found = floats(fill(fvd(windows="all")).compute())
    network, windows = SmallVideo(), []
    for seed, numbers, brighter in ((1, range(12), 40), (2, range(15), 0)):
        clips = [torch.from_numpy(pictures(n, seed, brighter)) for n in numbers]
        windows.append(network(torch.stack([clip[at : at + 3] for clip in clips for at in (0, 3)])))
    assert found["fd_small_3f_all"] == pytest.approx(float(frechet_distance_of(*windows)), rel=1e-9)
    assert found["kd_small_3f_all"] == pytest.approx(float(kernel_distance(*windows)), rel=1e-9)
    assert (found["fd_small_3f_all_n"], found["fd_small_3f_all_windows"]) == (12, 24)
    assert (found["fd_small_3f_all_n_real"], found["fd_small_3f_all_windows_real"]) == (15, 30)


def test_distances_rise_with_noise_on_the_pictures():
    figures = []
    for amount in (0, 10, 30, 90):
        metric = fvd()
        for n in range(40):
            noise = np.random.default_rng(n).normal(0, amount, (8, 4, 4, 3))
            metric.update(pictures(n), sound(n), number=n, real=True)
            metric.update(np.clip(pictures(n) + noise, 0, 255).astype(np.uint8), sound(n), number=n)
        figures.append(floats(metric.compute()))
    assert figures[0]["fd_small_3f"] < 1e-9
    for tag in ("fd_small_3f", "kd_small_3f"):
        values = [of[tag] for of in figures]
        assert all(a < b for a, b in pairwise(values)), values


def test_too_few_clips_say_how_many_there_are():
    with pytest.raises(OviError, match=r"fd_small_3f needs 2 or more clips in both sets, got 12 generated and 0 real"):
        fill(fvd(), real=[]).compute()
    with pytest.raises(OviError, match=r"got 1 generated and 15 real"):
        fill(fvd(), generated=[3]).compute()
    metric = fill(fvd(), generated=[])
    with pytest.raises(OviError, match=r"fd_small_3f needs 2 or more clips in both sets, got 0 generated and 15 real"):
        metric.compute()
    fill(metric, real=[])
    assert floats(metric.compute()) == floats(fill(fvd()).compute())


@pytest.mark.parametrize("make", [fvd, fad, lambda: fvd(kernel=False)])
def test_kept_statistics_stand_for_the_real_clips(make, tmp_path):
    metric = fill(make(), generated=[])
    torch.save(metric.real_state(), tmp_path / "real.pt")
    floor = floats(metric.floor())
    other = make()
    other.load_real_state(torch.load(tmp_path / "real.pt", weights_only=True))
    assert floats(other.floor()) == floor
    found, expected = floats(fill(other, real=[]).compute()), floats(fill(make()).compute())
    assert found == pytest.approx(expected, rel=1e-12)
    other.reset()
    assert not other.real_state()["clips_real_even"]


def test_statistics_of_another_metric_are_refused():
    state = fill(fvd(kernel=False), generated=[]).real_state()
    with pytest.raises(OviError, match="not statistics of fd_small_3f"):
        fvd().load_real_state(state)
    state["moments_real_odd"] = torch.zeros(3, 9)
    with pytest.raises(OviError, match=r"features of 4, the statistics \{'moments_real_odd': 9\}"):
        fvd(kernel=False).load_real_state(state)


def test_what_decides_the_figures_is_in_the_identity():
    kinds = [
        fvd(),
        fvd(stride=2),
        fvd(covariance="unbiased"),
        fvd(kernel=False),
        fvd(max_samples=9),
        fvd(num_frames=4),
        fvd(fps_at=4),
        FrechetVideoDistance(24, RATE, features="small"),
        fad(),
        fad(covariance="biased"),
    ]
    identities = [str(metric.identity()) for metric in kinds]
    assert len(set(identities)) == len(kinds)
    assert str(fvd().identity()) == identities[0]


def test_the_network_goes_where_the_metric_goes():
    metric = fvd()
    assert metric.to("meta").extractor.mix.device.type == "meta"
    assert metric.rows("moments_generated").device.type == "meta"


# --- sound --------------------------------------------------------------------------------------------------------


def test_sounds_give_the_distances_of_their_features():
    found = floats(fill(fad()).compute())
    generated, real = heard(range(12), 1, 1.5), heard(range(15), 2)
    logits = torch.stack([windows.sum(0) for windows in generated.split(4)])
    assert found == {
        "fd_ears": pytest.approx(float(frechet_distance_of(generated, real, unbiased=True)), rel=1e-9),
        "fd_ears_n": 12,
        "fd_ears_n_real": 15,
        "fd_ears_windows": 48,
        "fd_ears_windows_real": 60,
        "fd_ears_silent": 0,
        "fd_ears_silent_real": 0,
        "kad_ears": pytest.approx(float(kernel_audio_distance(generated, real)), rel=1e-9),
        "kad_ears_n": 48,
        "kad_ears_n_real": 60,
        "is_ears": pytest.approx(float(inception_score(logits)), rel=1e-6),
        "is_ears_n": 12,
    }
    assert "fd_ears_biased" in fad(covariance="biased").tag


def test_pairs_of_sounds_give_a_divergence():
    found = floats(fill(fad(), counterparts=True).compute())
    generated, real = (
        torch.stack([windows.sum(0) for windows in heard(range(12), seed, louder).split(4)])
        for seed, louder in ((1, 1.5), (2, 1.0))
    )
    assert found["kl_ears"] == pytest.approx(float(kl_divergence(generated, real)), rel=1e-6)
    assert found["kl_ears_n"] == 12


def test_a_network_without_classes_gives_distances_alone():
    metric = fill(fad(features={"name": "ears", "classes": False}), counterparts=True)
    assert not metric.USES_COUNTERPART
    assert fad().USES_COUNTERPART
    assert not [tag for tag in metric.compute() if tag.startswith(("is_", "kl_"))]


def test_silent_sounds_are_part_of_the_set_and_counted():
    metric = fill(fad())
    for n in (12, 13, 14):
        metric.update(pictures(n), np.zeros(RATE, np.float32), number=n)
    metric.update(pictures(15), np.zeros(RATE, np.float32), number=15, real=True)
    found = floats(metric.compute())
    assert (found["fd_ears_silent"], found["fd_ears_silent_real"], found["fd_ears_n"]) == (3, 1, 15)
    generated = torch.cat([heard(range(12), 1, 1.5), torch.zeros(12, 4)])
    real = torch.cat([heard(range(15), 2), torch.zeros(4, 4)])
    assert found["fd_ears"] == pytest.approx(float(frechet_distance_of(generated, real, unbiased=True)), rel=1e-9)


def test_a_wrong_rate_is_refused():
    with pytest.raises(OviError, match="is one of the rates wrong"):
        fad().update(pictures(0), sound(0)[::2])


# --- resampling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("from_hz", "to_hz"), [(48000, 16000), (44100, 16000), (16000, 48000), (44100, 48000)])
def test_a_tone_stays_the_same_tone(from_hz, to_hz):
    for hz in (100.0, 0.42 * min(from_hz, to_hz)):
        wave = 0.5 * np.sin(2 * np.pi * hz * np.arange(from_hz) / from_hz)
        found = resampled(wave, from_hz, to_hz)
        expected = 0.5 * np.sin(2 * np.pi * hz * np.arange(to_hz) / to_hz)
        inner = slice(to_hz // 10, -to_hz // 10)
        assert found.dtype == np.float32
        assert len(found) == to_hz
        assert np.abs(found - expected)[inner].max() < 1e-4


def test_a_tone_above_half_the_rate_is_gone():
    wave = np.sin(2 * np.pi * 9000.0 * np.arange(48000) / 48000)
    assert np.abs(resampled(wave, 48000, 16000)[1600:-1600]).max() < 1e-4


def test_a_click_stays_where_it_was():
    wave = np.zeros(22050, np.float32)
    wave[11025] = 1.0
    assert int(np.abs(resampled(wave, 22050, 16000)).argmax()) == 8000
    assert len(resampled(wave[:1001], 22050, 16000)) == math.ceil(1001 * 16000 / 22050)
    assert resampled(wave, 22050, 22050) is wave


def test_waveforms_and_rates_that_make_no_sense_are_refused():
    with pytest.raises(OviError, match=r"got \[2, 10\]"):
        resampled(np.zeros((2, 10)), 16000, 8000)
    with pytest.raises(OviError, match=r"not empty, got \[0\]"):
        resampled(np.zeros(0), 16000, 8000)
    with pytest.raises(OviError, match=r"got 16000 and 0"):
        resampled(np.zeros(10), 16000, 0)


def test_silence_is_what_nobody_hears():
    assert is_silent(np.zeros(10))
    assert is_silent(np.full(10, -9e-5))
    assert not is_silent(np.array([0, 0, -2e-4]))


# --- processes ----------------------------------------------------------------------------------------------------


def measure(rank: int, folder: str) -> None:
    """Two processes: a third and two thirds of the clips, then all on one."""
    meeting, patience = f"file://{folder}/meeting", timedelta(minutes=2)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=patience)
    found = {}
    for kind, make in (("fvd", lambda: fvd(max_samples=7)), ("fad", fad)):
        for share in ("uneven", "one_has_none"):
            cut = 4 if share == "uneven" else 0
            metric = make()
            fill(
                metric,
                range(cut) if rank == 0 else range(cut, 12),
                range(cut) if rank == 0 else range(cut, 15),
                counterparts=True,
            )
            found[kind, share] = {**metric.compute()}
            found[kind, share, "floor"] = metric.floor()
            found[kind, share, "state"] = state = metric.real_state()
            metric.reset()
            if rank == 0:
                metric.load_real_state(state)
            fill(metric, range(cut) if rank == 0 else range(cut, 12), [], counterparts=True)
            found[kind, share, "loaded"] = metric.compute()
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def measure_apart(folder: str) -> None:
    """The second process: no fixture has entered the networks there."""
    with small_networks():
        measure(1, folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_two_processes_give_what_one_gives(tmp_path):
    # This process is one of the two: each import of torchmetrics costs seconds.
    other = mp.get_context("spawn").Process(target=measure_apart, args=(str(tmp_path),))
    other.start()
    try:
        measure(0, str(tmp_path))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        other.join(60)
        other.kill()
    assert other.exitcode == 0
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for kind, make in (("fvd", lambda: fvd(max_samples=7)), ("fad", fad)):
        whole = fill(make(), counterparts=True)
        figures, floor = floats(whole.compute()), floats(whole.floor())
        for share in ("uneven", "one_has_none"):
            for of in found:
                assert floats(of[kind, share]) == pytest.approx(figures, rel=1e-9, abs=1e-12)
                assert floats(of[kind, share, "loaded"]) == pytest.approx(figures, rel=1e-9, abs=1e-12)
                assert floats(of[kind, share, "floor"]) == pytest.approx(floor, rel=1e-9, abs=1e-12)
