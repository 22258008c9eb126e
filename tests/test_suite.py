"""Several metrics over one stream: failures stay alone, real sets are measured once, processes agree."""

import json
from functools import partial

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from ovi.errors import OviError
from ovi.metrics.clip_metric import ClipMetric, MeasuredClip
from ovi.metrics.suite import MetricSuite

FPS, RATE = 8, 800


def clip(number, real=False, level=None, **about):
    level = number if level is None else level
    frames = np.full((8, 4, 4, 3), level, np.uint8)
    return MeasuredClip(frames, np.full(RATE, level / 100, np.float32), number=number, real=real, **about)


class Brightness(ClipMetric):
    """Mean grey level: needs no real set."""

    SUMS = ("total",)

    def __init__(self, fps, sample_rate, *, scale=1.0):
        super().__init__(fps, sample_rate)
        self.scale = scale

    def add_clip(self, clip):
        self.total += float(clip.frames.mean()) * self.scale

    def compute(self):
        return {"brightness": self.total / self.clips, "brightness_n": self.clips}

    def identity(self):
        return {**super().identity(), "scale": self.scale}


class Gap(ClipMetric):
    """|mean level of generated - of real|; its floor is that of two halves of the real set."""

    SUMS = ("generated", "real_a", "real_b", "n_a", "n_b")
    USES_REAL = True
    seen: list = []  # noqa: RUF012

    def add_clip(self, clip):
        level = float(clip.frames.mean())
        if not clip.real:
            self.generated += level
            return
        Gap.seen.append(clip.number)
        half = "b" if clip.number % 2 else "a"
        setattr(self, f"real_{half}", getattr(self, f"real_{half}") + level)
        setattr(self, f"n_{half}", getattr(self, f"n_{half}") + 1)

    def compute(self):
        real = (self.real_a + self.real_b) / (self.n_a + self.n_b)
        return {"gap": (self.generated / self.clips - real).abs()}

    def floor(self):
        state = self.real_state()
        return {"gap": (state["real_a"] / state["n_a"] - state["real_b"] / state["n_b"]).abs()}

    def real_state(self):
        names = ("real_a", "real_b", "n_a", "n_b")
        self.sync(should_sync=self._to_sync and torch.distributed.is_initialized())
        state = {name: getattr(self, name).clone() for name in names}
        if self._is_synced:
            self.unsync()
        return state

    def load_real_state(self, state):
        for name, value in state.items():
            setattr(self, name, value)


class Breaks(Brightness):
    """Raises at clip 2."""

    def add_clip(self, clip):
        if clip.number == 2:
            raise ZeroDivisionError("planted")
        super().add_clip(clip)


def suite(tmp_path=None, told=None, **factories):
    return MetricSuite(
        factories or {"bright": Brightness, "gap": Gap, "off": None},
        fps=FPS,
        sample_rate=RATE,
        warn=(told if told is not None else []).append,
        cache=tmp_path,
        real_set={"name": "planted"},
    )


def test_generated_and_real_figures_by_tag():
    metrics = suite()
    for i in range(4):
        metrics.add(clip(i, real=True, level=10 * i))
    for i in range(3):
        metrics.add(clip(i, level=60))
    found = metrics.figures()
    assert found.generated == {"brightness": 60, "brightness_n": 3, "gap": 45}
    assert found.real == {"brightness": 15, "brightness_n": 4, "gap": 10}  # halves: (0, 20) and (10, 30)
    assert (found.num_generated, found.num_real, found.failed) == (3, 4, {})


def test_a_second_round_keeps_the_real_set_and_forgets_the_generated_clips():
    metrics = suite()
    for i in range(4):
        metrics.add(clip(i, real=True, level=10))
    metrics.add(clip(0, level=50))
    assert metrics.figures().generated["gap"] == 40
    assert not metrics.wants_real
    metrics.add(clip(0, level=12))
    again = metrics.figures()
    assert again.generated == {"brightness": 12, "brightness_n": 1, "gap": 2}
    assert again.real["brightness"] == 10
    assert again.num_real is None


def test_the_real_set_is_read_back_from_disk_unless_anything_that_decides_it_changed(tmp_path):
    first = suite(tmp_path)
    for i in range(4):
        first.add(clip(i, real=True, level=10 * i))
    first.add(clip(0, level=60))
    expected = first.figures()
    assert len(list(tmp_path.glob("*.pt"))) == 2
    assert not list(tmp_path.glob("*.partial"))

    second = suite(tmp_path)
    assert not second.wants_real
    second.add(clip(0, level=60))
    found = second.figures()
    assert (found.generated, found.real) == (expected.generated, expected.real)
    assert suite(tmp_path, bright=partial(Brightness, scale=2.0)).wants_real
    other = MetricSuite(
        {"gap": Gap}, fps=FPS, sample_rate=RATE, warn=print, cache=tmp_path, real_set={"name": "another"}
    )
    assert other.wants_real


def test_a_damaged_cache_is_measured_anew_and_said(tmp_path):
    first = suite(tmp_path)
    first.add(clip(0, real=True))
    first.add(clip(1, real=True))
    first.add(clip(0))
    first.figures()
    for file in tmp_path.glob("*.pt"):
        file.write_bytes(file.read_bytes()[:100])
    told = []
    metrics = suite(tmp_path, told)
    assert metrics.wants_real
    assert any("measured anew" in sentence for sentence in told)
    metrics.add(clip(0, real=True, level=8))
    metrics.add(clip(1, real=True, level=8))
    metrics.add(clip(0, level=10))
    assert metrics.figures().generated["gap"] == 2


def test_a_metric_that_fails_is_off_loudly_once_and_the_others_go_on():
    told = []
    metrics = suite(None, told, good=Brightness, bad=Breaks)
    for _ in range(2):
        for i in range(4):
            metrics.add(clip(i, level=20))
        found = metrics.figures()
        assert found.generated == {"brightness": 20, "brightness_n": 4}
        assert found.failed == {"bad": "ZeroDivisionError: planted"}
    assert metrics.names == ["good"]
    assert len(told) == 1
    assert "'bad'" in told[0]
    assert "planted" in told[0]


def test_clips_nobody_can_measure_are_left_out_and_counted():
    told = []
    metrics = suite(None, told, bright=Brightness)
    metrics.add(clip(0, level=30))
    broken = clip(1)
    metrics.add(MeasuredClip(broken.frames, np.full(RATE, np.nan, np.float32), number=1))
    metrics.add(MeasuredClip(broken.frames, np.zeros(2 * RATE, np.float32), number=2))
    found = metrics.figures()
    assert (found.num_generated, found.num_unusable) == (1, 2)
    assert found.generated["brightness"] == 30
    assert len(told) == 1
    assert "NaN" in told[0]


@pytest.mark.parametrize(
    ("frames", "waveform", "words"),
    [
        (np.zeros((8, 4, 4), np.uint8), np.zeros(RATE), r"\[T, H, W, 3\]"),
        (np.zeros((0, 4, 4, 3), np.uint8), np.zeros(RATE), r"\[T, H, W, 3\]"),
        (np.full((8, 4, 4, 3), np.nan), np.zeros(RATE), "NaN"),
        (np.full((8, 4, 4, 3), 0.5), np.zeros(RATE), "uint8"),
        (np.zeros((8, 4, 4, 3), np.uint8), np.zeros((2, RATE)), "mono"),
        (np.zeros((8, 4, 4, 3), np.uint8), np.zeros(0), "not empty"),
        (np.zeros((8, 4, 4, 3), np.uint8), np.zeros(2 * RATE), "rates wrong"),
    ],
)
def test_what_is_no_clip_is_refused(frames, waveform, words):
    with pytest.raises(OviError, match=words):
        Brightness(FPS, RATE).update(frames, waveform)


def test_a_metric_that_cannot_be_built_names_the_knob():
    def missing(fps, sample_rate):
        raise OviError("no weights")

    with pytest.raises(OviError, match=r"'needy': no weights.*metrics.needy=null"):
        suite(needy=missing)


def _process(rank, world_size, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    metrics = suite(folder, None, bright=Brightness, gap=Gap, bad=Breaks)
    metrics.by_clip = True
    rounds = []
    for level in (60, 70):
        if metrics.wants_real:
            for i in range(rank, 5, world_size):
                metrics.add(clip(i, real=True, level=10 * i))
        for i in range(rank, 3, world_size):
            metrics.add(clip(i, level=level + i))
        found = metrics.figures()
        clips = [[c.number, c.figures] for c in found.clips]
        rounds.append([found.generated, found.real, found.num_generated, found.failed, clips])
    (folder / f"{world_size}_{rank}.json").write_text(json.dumps(rounds))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_one_and_two_processes_give_the_same_figures_and_agree_on_failures(tmp_path):
    results = {}
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        mp.spawn(_process, (world_size, folder), world_size)
        results[world_size] = [
            json.loads((folder / f"{world_size}_{rank}.json").read_text()) for rank in range(world_size)
        ]
    (alone,) = results[1]
    for other in results[2]:
        assert other == alone
    assert alone[0][0] == {"brightness": 61, "brightness_n": 3, "gap": 41}
    assert alone[1][0]["gap"] == 51
    assert alone[1][4] == [[i, {"brightness": 70 + i}] for i in range(3)]
    assert alone[0][3] == {"bad": "ZeroDivisionError: planted"}


class Network(Brightness):
    """Holds a network."""

    built = 0

    def __init__(self, fps, sample_rate):
        super().__init__(fps, sample_rate)
        self.network = torch.nn.Linear(2, 2)
        Network.built += 1


def test_real_and_generated_clips_share_a_network_but_no_sum():
    metrics = suite(None, None, net=Network)
    assert Network.built == 1
    metrics.add(clip(0, real=True, level=10))
    metrics.add(clip(0, level=50))
    metrics.add(clip(1, level=60))
    found = metrics.figures()
    assert found.real == {"brightness": 10, "brightness_n": 1}
    assert found.generated == {"brightness": 55, "brightness_n": 2}


def test_statistics_of_a_set_that_was_not_whole_are_not_kept(tmp_path):
    factories = {"gap": Gap}
    knobs = {"fps": FPS, "sample_rate": RATE, "warn": print, "cache": tmp_path, "real_set": "x", "num_real": 3}
    for count, kept in ((2, 0), (3, 1)):
        metrics = MetricSuite(factories, **knobs)
        assert metrics.wants_real
        for i in range(count):
            metrics.add(clip(i, real=True))
        metrics.add(clip(0))
        metrics.figures()
        assert len(list(tmp_path.glob("*.pt"))) == kept


def test_a_cache_that_cannot_be_written_is_said_and_stops_nothing(tmp_path):
    told = []
    metrics = suite(tmp_path / "file" / "below", told)
    (tmp_path / "file").write_text("not a folder")
    for i in range(2):
        metrics.add(clip(i, real=True))
    metrics.add(clip(0))
    assert metrics.figures().generated
    assert any("are not kept" in sentence for sentence in told)


class Dark(ClipMetric):
    """Mean grey level of the clips that are not too bright: not defined for every clip. Counts what it measures."""

    SUMS = ("total", "covered")
    LOWER = ("dark",)
    measured = 0

    def add_clip(self, clip):
        Dark.measured += 1
        if clip.frames.mean() < 50:
            self.total += float(clip.frames.mean())
            self.covered += 1

    def compute(self):
        return {"dark": self.total / self.covered, "dark_coverage": self.covered / self.clips}


def test_figures_of_every_clip_cost_no_second_measurement_and_change_no_figure():
    levels = [10, 60, 30, 33]
    found = {}
    for by_clip in (False, True):
        metrics = MetricSuite(
            {"dark": Dark, "gap": Gap, "bad": Breaks}, fps=FPS, sample_rate=RATE, warn=print, by_clip=by_clip
        )
        for _ in range(2):  # a second round begins anew
            for i in range(4):
                metrics.add(clip(i, real=True, level=10 * i))
            Dark.measured = 0
            for i in (2, 0, 3, 1):
                metrics.add(clip(i, level=levels[i], caption=f"clip {i}"))
            assert Dark.measured == 4
            found[by_clip] = metrics.figures()
    assert found[True].generated == found[False].generated
    assert found[True].generated["dark"] == pytest.approx(73 / 3)
    assert found[False].clips == []
    # Distances have no figures of a clip, counts are none, and what was given up is gone.
    assert [(c.number, c.caption, list(c.figures)) for c in found[True].clips] == [
        (i, f"clip {i}", ["dark"]) for i in range(4)
    ]
    values = [c.figures["dark"] for c in found[True].clips]
    assert np.array_equal(values, [10, np.nan, 30, 33], equal_nan=True)


def test_two_metrics_of_one_tag_are_one_too_many():
    told = []
    metrics = suite(None, told, one=Brightness, two=Brightness)
    metrics.add(clip(0, level=30))
    found = metrics.figures()
    assert found.generated["brightness"] == 30
    assert "another metric gives brightness" in found.failed["two"]
