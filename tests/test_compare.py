"""Means, intervals and paired tests of runs: against scipy, closed forms and planted truths; `ovi compare`."""

import itertools
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ovi.commands.compare import _side
from ovi.commands.main import main
from ovi.errors import OviError
from ovi.metrics.clip_metric import METRICS, ClipMetric
from ovi.metrics.directions import _load_metrics, direction
from ovi.runs.intervals import crossed_interval, holm, interval_of_mean, sign_flip_p
from ovi.runs.paired import paired
from ovi.runs.run import load_run
from ovi.runs.statistics import summarise
from test_feature_distances import fad, fill, fvd, small_networks

TAG = "val/av_offset_xcorr_ms"
CONFIG = {
    "data": {"path": "data/planted", "num_workers": 0},
    "callbacks": {"joint_eval": {"generator": {"num_steps": 4, "seed": 0, "batch_size": 8}}},
}


def write_run(folder, values, *, seed=0, label="ovi", step=100, captions=None, config=None, metrics=None, **summary):
    """A finished run whose clips have these figures (None: undefined); the final figure is their mean."""
    folder.mkdir(parents=True)
    config = CONFIG | (config or {})
    known = [v for v in values if v is not None]
    metrics = {TAG: float(np.mean(known)) if known else math.nan, **(metrics or {})}
    contents = {
        "run.json": {"label": label, "variant": {"model/fusion": label}, "seed": seed, "config_hash": f"{label}{seed}"},
        "config.yaml": config,
        "summary.json": {"steps": step, "metrics": metrics, **summary},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    captions = captions or [f"prompt {n}" for n in range(len(values))]
    lines = [
        {"step": s, "number": n, "caption": captions[n], "figures": {TAG.removeprefix("val/"): v if s == step else 1e6}}
        for s in (step // 2, step)
        for n, v in enumerate(values)
    ]
    (folder / "clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load_run(folder)


def trainings(root, label, values, **options):
    """A run a row of values [seeds, clips]."""
    return [
        write_run(root / f"{label}_seed{s}", list(row), seed=s, label=label, **options) for s, row in enumerate(values)
    ]


# --- intervals -------------------------------------------------------------------------------------------------------


def test_few_values_have_students_interval():
    x = [1.0, 2.5, 4.0, math.nan]
    found = interval_of_mean(x)
    half = stats.t.ppf(0.975, 2) * np.std(x[:3], ddof=1) / 3**0.5
    assert (found.low, found.high) == pytest.approx((2.5 - half, 2.5 + half))
    assert found.p == pytest.approx(stats.ttest_1samp(x[:3], 0).pvalue)
    assert found.method == "t"


def test_many_values_have_a_bootstrap_interval_that_repeats():
    x = np.random.default_rng(0).exponential(size=200)
    found = interval_of_mean(x)
    assert found == interval_of_mean(x)
    assert found.method == "bootstrap"
    half = 1.96 * x.std(ddof=1) / 200**0.5
    assert (found.low, found.high) == pytest.approx((x.mean() - half, x.mean() + half), rel=0.05)
    assert found.p < 0.001


@pytest.mark.parametrize("values", [[], [3.0], [2.0, 2.0, 2.0], [math.nan, 1.0]])
def test_no_spread_no_interval(values):
    found = interval_of_mean(values)
    assert [math.isnan(x) for x in (found.low, found.high, found.p)] == [True] * 3


def test_sign_flips_are_counted():
    x = [0.5, 1.25, -0.25, 2.0]
    means = [abs(np.dot(signs, x)) for signs in itertools.product((-1, 1), repeat=4)]
    assert sign_flip_p(x) == pytest.approx(np.mean([m >= abs(sum(x)) - 1e-12 for m in means]))
    assert sign_flip_p([5.0, 6.0, 7.0]) == pytest.approx(2 / 2**3)
    assert sign_flip_p([5.0]) == 1
    assert math.isnan(sign_flip_p([]))


def test_a_crossed_interval_is_never_narrower_than_one_over_trainings_alone():
    rng = np.random.default_rng(3)
    d = 2 + rng.normal(size=(4, 1)) + rng.normal(size=(4, 12))
    found, alone = crossed_interval(d), interval_of_mean(d.mean(1))
    assert found.low <= alone.low
    assert found.high >= alone.high
    assert (found.low + found.high) / 2 == pytest.approx(d.mean())
    # Without any difference between trainings or clips only chance is left, and both agree on the centre.
    assert math.isnan(crossed_interval(np.full((3, 5), 2.0)).p)
    assert math.isnan(crossed_interval(d[:1]).p)


def test_one_clip_leaves_the_interval_over_trainings():
    d = np.array([[1.0], [2.0], [4.0]])
    found, alone = crossed_interval(d), interval_of_mean(d[:, 0])
    assert (found.low, found.high, found.p) == pytest.approx((alone.low, alone.high, alone.p))


def test_holm():
    assert holm([0.01, 0.04, 0.03, math.nan]) == pytest.approx([0.03, 0.06, 0.06, math.nan], nan_ok=True)
    assert holm([0.9, 0.8]) == [1.0, 1.0]


# --- summaries -------------------------------------------------------------------------------------------------------


def test_variants_are_ranked_by_the_way_their_metric_says_and_what_is_missing_is_last():
    rows = [("a", 10.0, 0.2), ("a", 12.0, 0.4), ("b", 5.0, 0.9), ("c", math.nan, math.nan)]
    table = pd.DataFrame(rows, columns=["label", TAG, "val/av_align_iou"])
    lower = summarise(table, TAG)
    assert lower["label"].tolist() == ["b", "a", "c"]
    assert lower["n"].tolist() == [1, 2, 0]
    assert lower["mean"].tolist()[:2] == [5.0, 11.0]
    assert lower["std"].tolist()[1] == pytest.approx(2**0.5)
    assert lower["interval"].tolist() == ["none", "t", "none"]
    low, high = stats.t.interval(0.95, 1, 11, 1)
    assert (lower["low"][1], lower["high"][1]) == pytest.approx((low, high))
    assert summarise(table, "val/av_align_iou")["label"].tolist() == ["b", "a", "c"]
    with pytest.raises(OviError, match="no column 'val/x'"):
        summarise(table, "val/x")


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_with_one_seed_the_result_is_the_paired_t_test_over_clips(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(10, 3, 12), rng.normal(14, 3, 12)
    a, b = trainings(tmp_path, "ovi", [x]), trainings(tmp_path, "none", [y])
    found = paired(a, b, TAG, names=("ovi", "none"))
    wanted = stats.ttest_rel(x, y)
    assert found.difference == pytest.approx((x - y).mean())
    assert (found.interval.low, found.interval.high) == pytest.approx(tuple(wanted.confidence_interval()))
    assert found.p == pytest.approx(wanted.pvalue)
    assert (found.num_seeds, found.num_pairs) == (1, 12)
    assert found.better == "lower"
    assert found.real
    assert found.verdict.startswith("ovi is lower (better) by")
    assert "given these two trainings" in found.verdict
    assert math.isnan(found.over_trainings.p)


def test_clips_of_one_training_are_not_taken_for_trainings(tmp_path):
    """Each training shifts all of its clips alike: hundreds of clips then say no more than three seeds do."""
    rng = np.random.default_rng(1)
    shifts = np.array([6.0, 1.0, -1.0])
    x = 10 + shifts[:, None] + rng.normal(0, 0.1, (3, 40))
    y = 10 + rng.normal(0, 0.1, (3, 40))
    found = paired(trainings(tmp_path, "ovi", x), trainings(tmp_path, "none", y), TAG)
    assert not found.real
    wanted = stats.ttest_1samp(x.mean(1) - y.mean(1), 0)
    assert found.p == pytest.approx(wanted.pvalue, rel=0.01)
    assert found.over_clips.p < 1e-3
    assert "more seeds may show" in found.verdict
    assert found.p_flips == pytest.approx(0.5)


def test_without_figures_by_clip_seeds_alone_are_compared(tmp_path):
    x, y = [3.0, 3.2, 3.1, 2.9], [5.1, 5.0, 5.4, 4.9]
    runs = [
        [
            write_run(tmp_path / f"{label}{s}", [1.0], seed=s, metrics={"val/fd_small_16f": v})
            for s, v in enumerate(values)
        ]
        for label, values in (("a", x), ("b", y))
    ]
    found = paired(*runs, "fd_small_16f")
    assert found.p == pytest.approx(stats.ttest_rel(x, y).pvalue)
    assert (found.tag, found.num_seeds, found.num_pairs, found.real) == ("val/fd_small_16f", 4, 0, True)
    one = paired(runs[0][:1], runs[1][:1], "val/fd_small_16f")
    assert not one.real
    assert "no difference can be told: one training a side" in one.verdict


def test_undefined_clips_leave_their_pairs_out_and_are_counted(tmp_path):
    a = trainings(tmp_path, "ovi", [[1.0, None, 3.0, 5.0, 2.0]])
    b = trainings(tmp_path, "none", [[2.0, 4.0, None, None, 4.0]])
    found = paired(a, b, TAG)
    assert (found.num_pairs, found.num_undefined) == (2, (1, 2))
    assert found.difference == pytest.approx(-1.5)
    nothing = paired(a, trainings(tmp_path, "off", [[None] * 5]), TAG)
    assert not nothing.real
    assert "no pair has the figure on both sides" in nothing.verdict


def test_the_same_runs_differ_by_nothing(tmp_path):
    values = np.random.default_rng(2).normal(size=(3, 8))
    found = paired(trainings(tmp_path / "x", "a", values), trainings(tmp_path / "y", "b", values), TAG)
    assert found.difference == 0
    assert not found.real
    assert "no difference" in found.verdict
    json.dumps(found.to_dict(), allow_nan=False)


GENERATOR = {"num_steps": 4, "seed": 0, "batch_size": 8}


def _generator(**changed):
    return {"callbacks": {"joint_eval": {"generator": GENERATOR | changed}}}


@pytest.mark.parametrize(
    ("changed", "words", "allowed"),
    [
        ({"captions": [f"prompt {n}" for n in (0, 1, 2, 9)]}, "other prompts: clip 3 is 'prompt 3'.*'prompt 9'", None),
        ({"config": _generator(num_steps=9)}, "differ in generator.*num_steps: 4.*9", "generator"),
        ({"config": _generator(seed=1)}, "generated from other noise.*no pairs", None),
        ({"config": {"data": {"path": "elsewhere"}}}, "differ in data.*'data/planted'.*'elsewhere'", "data"),
        ({"step": 200}, "differ in steps.*100.*200", "steps"),
    ],
    ids=["prompts", "generator", "noise", "data", "steps"],
)
def test_what_makes_no_pairs_is_refused(tmp_path, changed, words, allowed):
    a = [write_run(tmp_path / "a", [1.0, 2.0, 3.0, 5.0])]
    b = [write_run(tmp_path / "b", [2.0, 4.0, 4.0, 5.0], **changed)]
    with pytest.raises(OviError, match=words):
        paired(a, b, TAG)
    if allowed:
        assert paired(a, b, TAG, allow=[allowed]).difference == -1
    with pytest.raises(OviError, match="what may be let differ is data, generator, steps"):
        paired(a, b, TAG, allow=["seeds"])


def test_what_makes_no_difference_is_let_through(tmp_path):
    a = [write_run(tmp_path / "a", [1.0, 2.0])]
    other = {"data": {"path": "data/planted", "num_workers": 4}} | _generator(batch_size=2)
    assert paired(a, [write_run(tmp_path / "b", [2.0, 3.0], config=other)], TAG).difference == -1
    # One budget of operations takes other numbers of steps; the clips of both ends are pairs.
    budget = {"budget": {"flops": 1e12, "steps": None}}
    pair = [write_run(tmp_path / f"c{step}", [1.0, step / 100], step=step, config=budget) for step in (100, 300)]
    assert paired(pair[:1], pair[1:], TAG).difference == -1


def test_what_a_sweep_varies_on_purpose_is_no_obstacle(tmp_path):
    runs = [write_run(tmp_path / f"{n}", [1.0, float(n)], config=_generator(num_steps=n)) for n in (4, 8)]
    varied = [load_run(_varied(run.folder, {"generation.num_steps": run.folder.name})) for run in runs]
    assert paired(varied[:1], varied[1:], TAG).difference == -2


def _varied(folder, variant):
    content = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(content | {"variant": variant}))
    return folder


def test_sides_that_cannot_be_paired_are_refused(tmp_path):
    first = write_run(tmp_path / "a", [1.0], seed=0)
    with pytest.raises(OviError, match=r"no seed was trained on both sides.*a has 0; b has 4"):
        paired([first], [write_run(tmp_path / "b", [1.0], seed=4)], TAG)
    with pytest.raises(OviError, match="two runs of seed 0"):
        paired([first, write_run(tmp_path / "c", [1.0], seed=0)], [first], TAG)
    (tmp_path / "a" / "summary.json").unlink()
    with pytest.raises(OviError, match="is stopped: only finished"):
        paired([load_run(tmp_path / "a")], [first], TAG)
    with pytest.raises(OviError, match="metric=none: no run of a has this figure; its runs have val/av_offset"):
        paired([first], [first], "none")


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def sweep(tmp_path):
    rng = np.random.default_rng(5)
    for label, mean in (("ovi", 10.0), ("none", 90.0)):
        values = mean + rng.normal(0, 1, (3, 6))
        for seed, row in enumerate(values):
            write_run(
                tmp_path / "study" / f"{label}_seed{seed}", list(row), seed=seed, label=f"fusion={label}",
                metrics={"val/loss": 1 + rng.normal(0, 0.1)},
            )  # fmt: skip
    for seed in range(3):  # what a sweep sets apart stands in the variant
        for label in ("ovi", "none"):
            _varied(tmp_path / "study" / f"{label}_seed{seed}", {"model/fusion": label})
    return tmp_path / "study"


def test_variants_of_a_sweep_by_label_or_value(sweep, tmp_path, capsys):
    main(["compare", f"{sweep}:fusion=ovi", f"{sweep}:none", f"out={tmp_path / 'out' / 'result.json'}"])
    printed = capsys.readouterr().out
    assert re.search(r"fusion=ovi is lower \(better\) by (79|80)\.\d+ \[", printed)
    assert "real at the 95 % level over trainings (3 seeds) and clips" in printed
    assert "no difference can be told over trainings" in printed
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    offset, loss = result["figures"]
    assert (offset["tag"], offset["real"], offset["pairs"]) == (TAG, True, 18)
    assert offset["over_trainings"]["low"] < -79 < offset["over_trainings"]["high"] + 2
    assert (loss["tag"], loss["real"], loss["pairs"]) == ("val/loss", False, 0)
    assert result["a"] == {"name": "fusion=ovi", "runs": [f"ovi_seed{s}" for s in range(3)]}
    assert str(tmp_path) not in json.dumps(result)


def test_a_label_may_hold_colons(tmp_path):
    for label in ("plan=every:2", "plan=all"):
        write_run(tmp_path / "s" / label.replace(":", "-"), [1.0, 2.0], label=label)
    assert _side(f"{tmp_path}/s:plan=every:2", []).name == "plan=every:2"


def test_run_folders_lists_and_patterns(sweep, capsys):
    main(["compare", str(sweep / "ovi_seed0"), str(sweep / "none_seed0"), f"metric={TAG}"])
    assert "over clips, given these two trainings" in capsys.readouterr().out
    main(["compare", f"{sweep}/ovi_seed0,{sweep}/ovi_seed1", f"{sweep}/none_seed*", f"metric={TAG}"])
    captured = capsys.readouterr()
    assert "over trainings (2 seeds)" in captured.out
    assert "seeds of one side only are left out: 2" in captured.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{s}:ovii", "{s}:none"], "no variant 'ovii'.*There are: fusion=none, fusion=ovi"),
        (["{s}", "{s}:none"], "runs of several variants: choose one, as in"),
        (["{s}:ovi"], "takes two sides, got 1"),
        (["{s}:ovi", "{s}:none", "metrc=x"], "no option 'metrc'. Did you mean 'metric'"),
        (["{s}:ovi", "{s}:none", "level=95"], "confidence between 0 and 1"),
        (["{s}:ovi", "{s}:none", "metric=val/fdd"], "no run of fusion=ovi has this figure"),
        (["{s}:ovi", "{s}:none", "out=x.csv"], "name a .json file"),
        (["{s}/nowhere", "{s}:none"], "there is no such folder"),
    ],
)
def test_bad_input_is_told(sweep, words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compare", *(word.format(s=sweep) for word in words)])
    assert stop.value.code == 1
    assert re.search(message, capsys.readouterr().err)


def test_runs_that_have_not_finished_are_left_out_and_said(sweep, capsys):
    (sweep / "ovi_seed2" / "summary.json").unlink()
    main(["compare", f"{sweep}:ovi", f"{sweep}:none", f"metric={TAG}"])
    captured = capsys.readouterr()
    assert "ovi_seed2 is left out: it is stopped" in captured.err
    assert "2 seeds" in captured.out


# --- which way is better ---------------------------------------------------------------------------------------------


SUMS_ALONE = {
    "av_offset": {}, "av_align": {}, "impacts": {}, "planted": {}, "desync": {}, "dnsmos": {}, "syncnet": {},
    "clap": {"backend": SimpleNamespace(name="laion"), "audio_only_caption": True},
    "wer": {"recogniser": SimpleNamespace(name="whisper")},
}  # fmt: skip
"""Metrics whose figures follow from their sums, and what else they want of themselves: networks are left away."""


def figures_of(name):
    """Every figure that a metric gives."""
    if name in SUMS_ALONE:
        kind = METRICS[name]
        metric = kind.__new__(kind)
        ClipMetric.__init__(metric, 8, 16000)
        for attribute, value in SUMS_ALONE[name].items():
            setattr(metric, attribute, value)
        for total in ("clips", *kind.SUMS):
            setattr(metric, total, getattr(metric, total) + 1)
        metric._update_count = 1
        return set(metric.compute())
    with small_networks():
        return set(fill({"fvd": fvd, "fad": fad}[name](), counterparts=True).compute())


def every_metric():
    _load_metrics()
    return [name for name in METRICS if METRICS[name].__module__.startswith("ovi.")]


@pytest.mark.parametrize("name", every_metric())
def test_every_metric_says_which_way_each_of_its_figures_is_better(name):
    kind, found = METRICS[name], figures_of(name)
    said = {tag: kind.direction(tag) for tag in found}  # raises for one that is not declared
    assert {"lower", "higher"} & set(said.values())
    for tag, way in said.items():
        assert direction(f"val/{tag}") == way, f"another metric says otherwise of {tag}"
        counted = tag.endswith(
            ("_n", "_n_real", "_coverage", "_windows", "_windows_real", "_silent", "_silent_real", "_prompt")
        )
        assert (way is None) == counted, tag


def test_directions_of_what_no_metric_gives_and_of_tags_known_from_papers():
    wanted = {
        "val/fvd_i3d_16f": "lower", "kd_r3d_16f": "lower", "fad_vggish": "lower", "is_panns": "higher",
        "clap_laion": "higher", "val/wer_whisper": "lower", "val/lse_c_syncnet": "higher", "dnsmos_ovrl": "higher",
        "desync_synchformer": "lower", "av_align_iou": "higher", "planted_count_video": "higher",
        "val/loss_audio": "lower", "val_sigma/video_0-0.2": "lower", "seconds": "lower", "val/num_clips": None,
        "train/samples_per_s": "higher", "attention/video_hears_audio_ms": None, "unheard_of": None,
    }  # fmt: skip
    assert {tag: direction(tag) for tag in wanted} == wanted
