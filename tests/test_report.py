"""The report's numbers, tables and page as text, against planted runs; what a browser makes of it is in
``test_report_browser.py``."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats

from ovi.commands.compare import _split
from ovi.commands.report import _parse, main
from ovi.errors import OviError
from ovi.report.attention import maps_of
from ovi.report.curves import thinned
from ovi.report.page import write_page
from ovi.report.provenance import mixed, provenance, swept, why
from ovi.report.ranking import choose_metrics, companion, finished_table, rank, ranked_tags
from ovi.report.samples import check_size, data_uri_body, samples_of
from ovi.report.tables import paper_table
from ovi.runs.alive import alive
from ovi.runs.comparable import pairs_by_seed
from ovi.runs.run import find_runs, load_run
from ovi.runs.statistics import summarise
from ovi.runs.table import table_of
from run_folders import CAPTIONS, LOSS, OFFSET, clip_file, run_folder, sweep_folder

README = (Path(__file__).parents[1] / "README.md").read_text()
HOSTILE = '</script><img src=x onerror="window.hacked=1">&amp;<b>'


@pytest.fixture(scope="module")
def swept_runs(tmp_path_factory) -> Path:
    return sweep_folder(tmp_path_factory.mktemp("report") / "sweep", {"ovi": 40, "bridge": 60, "none": 240})


@pytest.fixture
def runs(swept_runs):
    return find_runs(swept_runs)[0]


def folder(path, **options):
    return run_folder(path, **{"label": "a", "seed": 0, "metrics": {OFFSET: 5.0}, **options})


# --- numbers --------------------------------------------------------------------------------------------------------


def test_ranking_is_mean_spread_and_students_interval(runs):
    rows = rank(finished_table(runs), OFFSET)
    assert [row["label"] for row in rows] == ["fusion=ovi", "fusion=bridge", "fusion=none"]
    values = [39.0, 40.0, 41.0]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    found = rows[0]
    assert (found["n"], found["mean"], found["std"]) == (3, pytest.approx(40), pytest.approx(1))
    assert (found["low"], found["high"]) == (pytest.approx(low), pytest.approx(high))
    assert (found["coverage"], found["clips"], found["lacking"]) == (0.75, 8, 0)


def test_a_bootstrap_is_to_be_had_and_told_of(runs, tmp_path, swept_runs, capsys):
    """Of three seeds it cannot leave what they span; Student's t does, and must."""
    rows = rank(finished_table(runs), OFFSET, "bootstrap")
    assert {row["interval"] for row in rows} == {"bootstrap"}
    for narrow, wide in zip(rows, rank(finished_table(runs), OFFSET)):
        values = [run.metrics[OFFSET] for run in runs if run.label == narrow["label"]]
        assert min(values) <= narrow["low"] < narrow["mean"] < narrow["high"] <= max(values)
        assert wide["low"] < narrow["low"]
        assert narrow["high"] < wide["high"]
    page = page_of(runs, tmp_path / "page", intervals="bootstrap")
    assert "intervals=bootstrap with 3 seeds" in page.words
    main([str(swept_runs), "format=md", "spread=interval", "intervals=bootstrap"])
    told = capsys.readouterr()
    assert "95 % interval (bootstrap)" in told.out
    assert "intervals=bootstrap with 3 seeds" in told.err
    with pytest.raises(OviError, match="intervals must be one of auto, t, bootstrap"):
        page_of(runs, tmp_path / "other", intervals="boot")


def test_runs_without_the_figure_are_left_out_and_counted(tmp_path):
    for seed, metrics in enumerate([{OFFSET: 2.0}, {OFFSET: 4.0}, {LOSS: 1.0}, {OFFSET: float("nan"), LOSS: 1.0}]):
        folder(tmp_path / f"{seed}", seed=seed, metrics=metrics)
    folder(tmp_path / "b", label="b", metrics={LOSS: 1.0})
    a, b = rank(finished_table(find_runs(tmp_path)[0]), OFFSET)
    assert (a["label"], a["n"], a["mean"], a["lacking"]) == ("a", 2, 3.0, 2)
    assert (b["label"], b["n"], b["mean"], b["lacking"]) == ("b", 0, None, 1)


def test_metrics_are_chosen_or_refused_with_what_there_is(runs, tmp_path):
    table = finished_table(runs)
    assert ranked_tags(table) == [OFFSET, LOSS]
    assert choose_metrics(table, []) == [OFFSET, LOSS]
    assert choose_metrics(table, ["loss"]) == [LOSS]
    with pytest.raises(OviError, match=rf"metric=av_ofset_xcorr_ms: no finished run.*Did you mean.*{OFFSET}, {LOSS}"):
        choose_metrics(table, ["av_ofset_xcorr_ms"])
    folder(tmp_path / "a", metrics={OFFSET: 1.0})
    folder(tmp_path / "b", metrics={LOSS: 1.0})
    out = tmp_path / "report.html"
    with pytest.raises(OviError, match=rf"no figure is common to all 2 finished runs.*metric=TAG.*{OFFSET}, {LOSS}"):
        write_page(find_runs(tmp_path)[0], out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("val/impact_offset_ms", "val/impact_offset_coverage"),
        ("val/impact_offset_match_rate", "val/impact_offset_coverage"),
        ("val/impact_offset_coverage", None),
        ("val/loss", None),
    ],
)
def test_coverage_is_that_of_the_same_metric(tag, expected):
    assert companion(tag, ["val/impact_offset_coverage", "val/other_coverage", "val/loss"], "coverage") == expected


def test_long_curves_are_means_over_intervals_of_one_grid():
    steps = np.arange(1000)
    curves = {
        "0": pd.DataFrame({"step": steps, "tag": "train/loss", "value": steps * 1.0}),
        "1": pd.DataFrame({"step": steps[:500], "tag": "train/loss", "value": 2.0}),
        "2": pd.DataFrame({"step": [99, 199], "tag": "val/loss", "value": [3.0, np.nan]}),
        "3": pd.DataFrame({"step": [], "tag": [], "value": []}),
    }
    found = thinned(curves, most=100)
    line = found["train/loss"]
    assert line["bin"] == 10
    assert line["steps"] == [4.5 + 10 * i for i in range(100)]
    assert line["runs"]["0"] == line["steps"]
    assert line["runs"]["1"] == [2.0] * 50 + [None] * 50
    assert found["val/loss"] == {"steps": [99.0], "runs": {"2": [3.0]}, "bin": 1}


def test_maps_are_drawn_over_seconds_with_their_diagonal(tmp_path):
    """Times of unequal steps: the one bright column is where its seconds are, not where its number is."""
    run = load_run(folder(tmp_path / "run"))
    (run.folder / "attention").mkdir()
    keys = [0.05, 0.15, 0.25, 0.35, 1.2]
    record = {
        "step": 4, "direction": "video_hears_audio", "ms": 1.0, "uniform_ms": 2.0, "query_times": [0.25, 0.75],
        "key_times": keys, "real": [True] * 5, "shares": [[0, 0, 0, 0, 1], None],
    }  # fmt: skip
    (run.folder / "attention" / "maps.jsonl").write_text(
        json.dumps({**record, "step": 2, "ms": 9}) + "\n" + json.dumps(record)
    )
    found = maps_of(run)["video_hears_audio"]
    assert (found.step, found.ms) == (4, 1.0)
    coded = found.uri(5.0).removeprefix("data:image/png;base64,")
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(coded))).convert("RGB")).astype(int)
    height, width = picture.shape[:2]
    bright = picture[: height // 2].sum(-1).mean(0) > 600
    start, end = 0.0, keys[-1] + (keys[-1] - keys[-2]) / 2
    assert bright.argmax() / width == pytest.approx(((0.35 + 1.2) / 2 - start) / (end - start), abs=0.01)
    assert bright[bright.argmax() :].all()
    assert (picture[height // 2 + 1 :] == 150).all()  # nothing attended
    assert found.diagonal == pytest.approx([0, 0, 1.0 / end, 1], abs=1e-3)


# --- samples --------------------------------------------------------------------------------------------------------


def test_a_file_is_taken_once_and_other_captions_are_other_prompts(runs, tmp_path):
    found = samples_of(runs, most_prompts=None)
    assert [(p.number, p.caption) for p in found.prompts] == list(enumerate(CAPTIONS))
    assert len(found.files) == 4  # a clip a fusion, and the real one
    assert all(len(p.clips) == 9 and len(p.real) == 1 for p in found.prompts)
    clip = next((runs[0].folder / "samples").glob("step_*/*.mp4"))
    other = load_run(folder(tmp_path / "other", clip=clip, captions=["something else", CAPTIONS[1]]))
    both = samples_of([runs[0], other], most_prompts=3)
    assert [(p.number, p.caption, list(p.clips)) for p in both.prompts] == [
        (0, CAPTIONS[0], [0]), (0, "something else", [1]), (1, CAPTIONS[1], [0, 1]),
    ]  # fmt: skip
    # Without captions, the real clip says what was asked for.
    real = [clip_file(tmp_path / f"{n}.mp4", n / 3) for n in range(2)]
    silent = [
        load_run(folder(tmp_path / f"silent{n}", clip=clip, real_clip=real[n // 2], captions=["", ""]))
        for n in range(3)
    ]
    apart = samples_of(silent, most_prompts=None)
    assert [(p.number, list(p.clips), len(p.real)) for p in apart.prompts] == [
        (0, [0, 1], 1), (0, [2], 1), (1, [0, 1], 1), (1, [2], 1),
    ]  # fmt: skip
    assert both.notes == ["1 more prompts are left out: prompts=N shows more"]


def test_a_page_that_would_be_too_large_is_refused_before_it_is_written(runs, tmp_path):
    size = samples_of(runs, most_prompts=None).num_bytes
    with pytest.raises(OviError, match=r"clips take .* more than max_mb=0\.001.*prompts=1.*media=link"):
        write_page(runs, tmp_path / "report.html", max_mb=0.001)
    assert list(tmp_path.iterdir()) == []
    check_size(samples_of(runs, most_prompts=None), size * 4 / 3 / 1e6 + 1e-6)


# --- the page as text -----------------------------------------------------------------------------------------------


class Parsed(HTMLParser):
    """Elements with their attributes, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.words, self.in_script = "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.in_script = tag == "script"
        if self.in_script:
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag):
        self.in_script = False

    def handle_data(self, data):
        if self.in_script:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        else:
            self.words += data


def page_of(runs, tmp_path, **options) -> Parsed:
    return Parsed(write_page(runs, tmp_path / "report.html", **options).read_text())


def test_the_page_refers_to_nothing_outside_of_it(runs, tmp_path):
    page = page_of(runs, tmp_path)
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            address = attributes.get(name) or "#"
            assert address.startswith(("#", "data:")), (tag, name, address[:60])
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    run = [text for attributes, text in page.scripts if "type" not in attributes]
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in run]
    assert len(run) == 2
    assert [f"'sha256-{d}'" in policy for d in digests] == [True, True]
    media = [text for attributes, text in page.scripts if attributes.get("type") == "text/plain"]
    originals = {p.read_bytes() for p in (runs[0].folder.parent / ".media").iterdir()}
    assert {base64.b64decode(text) for text in media} == originals


def test_a_users_text_stays_text(tmp_path):
    clip = clip_file(tmp_path / "clip.mp4")
    folder(
        tmp_path / "runs" / "a",
        label=HOSTILE,
        variant={HOSTILE: HOSTILE},
        captions=[HOSTILE],
        clip=clip,
        attention_ms=40.0,
    )
    other = folder(tmp_path / "runs" / "b", status="failed", variant={HOSTILE: "other"})
    (other / "failed.json").write_text(json.dumps({"error": HOSTILE}))
    found, problems = find_runs(tmp_path / "runs")
    page = page_of(found, tmp_path, title=HOSTILE, problems=[*problems, HOSTILE])
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert not any(attributes.get("src") == "x" for _, attributes in page.elements)
    content = json.loads(next(text for attributes, text in page.scripts if attributes.get("id") == "content"))
    assert content["prompts"][0]["caption"] == HOSTILE
    assert page.words.count(HOSTILE) >= 6  # title twice, key, value, variant, error, problem


def test_a_clip_that_goes_while_the_page_is_made_is_named(runs, tmp_path):
    found = samples_of(runs, most_prompts=1)
    found.files.append(tmp_path / "gone.mp4")
    with pytest.raises(OviError, match=r"gone.mp4: cannot be read any more"):
        check_size(found, 100)
    with pytest.raises(OviError, match=r"gone.mp4: cannot be read any more"):
        data_uri_body(found.files[-1])


def test_linked_clips_are_addressed_from_the_page(runs, tmp_path):
    place = tmp_path / "pages here" / "r.html"
    page = Parsed(write_page(runs, place, media="link").read_text())
    content = json.loads(next(text for attributes, text in page.scripts if attributes.get("id") == "content"))
    assert not any(attributes.get("type") == "text/plain" for attributes, _ in page.scripts)
    assert all((place.parent / link.replace("%3D", "=")).is_file() for link in content["links"])


def test_every_status_is_listed_with_its_reason(tmp_path):
    folder(tmp_path / "done")
    folder(tmp_path / "bad", status="failed")
    folder(tmp_path / "cut", status="stopped")
    running = folder(tmp_path / "going", status="stopped", label="b")
    (running / "metrics.jsonl").write_text('{"step": 40, "generated": {}}\n{"step": 80, "gen')
    (running / "clips.jsonl").write_text('{"step": 40, "num')
    folder(tmp_path / "damaged")
    (tmp_path / "damaged" / "summary.json").write_text("{")
    with alive(running):
        found, problems = find_runs(tmp_path)
        assert {run.folder.name: why(run) for run in found} == {
            "done": "",
            "bad": "RuntimeError: loss is NaN",
            "cut": "was interrupted: no result and no error",
            "going": "is being written; last validation at step 40",
        }
        page = page_of(found, tmp_path, problems=problems)
    for words in (
        "1 finished",
        "1 running",
        "1 failed",
        "1 stopped",
        "damaged/summary.json: cannot be read",
        "step 40",
    ):
        assert words in page.words
    # None has finished: the page says so, a paper's table cannot.
    unfinished = [load_run(running)]
    page_of(unfinished, tmp_path)
    with pytest.raises(OviError, match=r"no run has finished \(stopped\)"):
        paper_table(unfinished, "md")


def test_the_head_says_what_was_done(runs):
    assert swept(runs) == {"model/fusion": ["bridge", "none", "ovi"]}
    facts = provenance(runs)
    assert facts["Data"] == ["data/planted"]
    assert facts["Steps"] == ["200"]
    assert facts["Seeds"] == ["0", "1", "2"]
    assert facts["Commit"] == ["0123456789"]
    assert facts["Command"] == ["ovi sweep sweep=planted"]
    assert facts["Began"] == ["2026-01-02 03:04"]


def test_means_over_unlike_runs_are_told(tmp_path, capsys):
    """Two trainings of one seed, or of other lengths, are not the seeds of one experiment."""
    folder(tmp_path / "a0", label="a", seed=0)
    folder(tmp_path / "a1", label="a", seed=1)
    assert mixed(find_runs(tmp_path)[0]) == []
    folder(tmp_path / "b0", label="b", seed=0)
    folder(tmp_path / "b1", label="b", seed=0, steps=400)
    folder(tmp_path / "b2", label="b", seed=1, steps=800, status="failed")
    found = find_runs(tmp_path)[0]
    twice, unlike = mixed(found)
    assert twice.startswith("b: trained more than once with seed 0")
    assert unlike.startswith("b: its runs differ in more than the seed (trainer.max_steps)")
    assert twice in page_of(found, tmp_path / "page").words
    main([str(tmp_path), "format=md", f"out={tmp_path / 'deep' / 'table.md'}"])
    assert twice in capsys.readouterr().err
    assert (tmp_path / "deep" / "table.md").read_text().startswith("| variant")


def test_runs_without_any_figure_still_make_a_page(tmp_path):
    pruned = folder(tmp_path / "a", metrics={})
    summary = json.loads((pruned / "summary.json").read_text())
    (pruned / "summary.json").write_text(json.dumps({**summary, "pruned": 40}))
    found = find_runs(tmp_path)[0]
    assert "pruned at step 40" in page_of(found, tmp_path / "page").words
    with pytest.raises(OviError, match=r"no run has finished \(pruned\)"):
        paper_table(found, "md")
    folder(tmp_path / "b", metrics={})
    with pytest.raises(OviError, match="none of the 1 finished runs has a figure"):
        paper_table(find_runs(tmp_path)[0], "md")


def test_a_pruned_run_is_no_result(tmp_path):
    """It ended early: beside whole ones its figure would count for what it is not."""
    for seed in (0, 1):
        folder(tmp_path / f"a{seed}", label="a", seed=seed, metrics={"val/loss": 0.5})
    pruned = folder(tmp_path / "a2", label="a", seed=2, metrics={"val/loss": 9.5})
    summary = json.loads((pruned / "summary.json").read_text())
    (pruned / "summary.json").write_text(json.dumps({**summary, "pruned": 40}))
    found = sorted(find_runs(tmp_path)[0], key=lambda run: run.seed)
    (row,) = rank(finished_table(found), "val/loss")
    assert (row["n"], row["mean"]) == (2, 0.5)
    table = paper_table(found, "md")
    assert "1 run is without a result and left out" in table
    assert "pruned at step 40" in page_of(found, tmp_path / "page").words
    assert "1 pruned" in page_of(found, tmp_path / "page").words
    table = table_of(found)
    assert sorted(table["status"]) == ["finished", "finished", "pruned"]
    assert summarise(table, "val/loss")[["n", "mean"]].to_numpy().tolist() == [[2, 0.5]]
    with pytest.raises(OviError, match="this run of b is pruned"):
        pairs_by_seed(found[:2], found[2:])


def contrast(one: str, other: str) -> float:
    """Of two colours #rrggbb, as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        return float(
            np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
        )

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_read(theme):
    """Text at 4.5 and marks of plots at 3, as WCAG AA asks."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    style = (files("ovi.report") / "templates" / "page.css").read_text()
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", re.findall(r":root \{(.*?)\}", style, re.DOTALL)[theme]))
    texts = [(text, on) for text in ("ink", "soft") for on in ("ground", "card", "mark", "best")]
    texts += [(kind, f"{kind}-ground") for kind in ("good", "busy", "bad", "idle")]
    texts += [("accent-ink", "accent"), ("accent", "card")]
    poor = {
        pair: contrast(*(colours[c] for c in pair)) for pair in texts if contrast(*(colours[c] for c in pair)) < 4.5
    }
    assert not poor
    marks = {f"c{i}": contrast(colours[f"c{i}"], colours["card"]) for i in range(10)}
    assert min(marks.values()) >= 3, marks


# --- tables for a paper ---------------------------------------------------------------------------------------------


def test_markdown_and_latex_tables(tmp_path):
    for label, values in {"a_b": [10.0, 12.0, 14.0], "c|d": [20.0, 20.5, 21.0]}.items():
        for seed, value in enumerate(values):
            folder(tmp_path / f"{label}{seed}", label=label, seed=seed, metrics={OFFSET: value, "val/num_clips": 4.0})
    found = find_runs(tmp_path)[0]
    assert paper_table(found, "md", metrics=["num_clips", "av_offset_xcorr_ms"], caption="Toy set.") == (
        "| variant | val/num\\_clips | val/av\\_offset\\_xcorr\\_ms ↓ |\n|---|---:|---:|\n"
        "| a\\_b | 4.000 ± 0.000 | **12.0 ± 2.0** |\n| c\\|d | 4.000 ± 0.000 | 20.50 ± 0.50 |\n\n"
        "Toy set. Mean ± standard deviation over seeds (n = 3).\n"
    )
    low, high = stats.t.interval(0.95, 2, 12, 2 / np.sqrt(3))
    text = paper_table(found, "latex", spread="interval")
    assert rf"    a\_b & \textbf{{12.0 [{low:.1f}, {high:.1f}]}} \\" in text
    assert r"val/av\_offset\_xcorr\_ms $\downarrow$ \\" in text
    assert r"\caption{Mean and its 95 \% interval (Student's t) over seeds (n = 3).}" in text
    assert [text.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]


def test_a_table_of_one_seed_claims_no_spread(tmp_path):
    """Nor does it show losses by noise level, unless they are asked for."""
    folder(tmp_path / "a", metrics={OFFSET: 5.0, "val_sigma/video_0-0.2": 1.0})
    text = paper_table(find_runs(tmp_path)[0], "md")
    assert text.splitlines()[0] == "| variant | val/av\\_offset\\_xcorr\\_ms ↓ |"
    assert text.splitlines()[-1] == "One seed each (n = 1): no spread is known."
    for seed in range(2):  # where rows are of different numbers of seeds, each says of how many
        folder(tmp_path / f"b{seed}", label="b", seed=seed, metrics={OFFSET: 10.0 + 2 * seed})
    rows = paper_table(find_runs(tmp_path)[0], "md").splitlines()[2:4]
    assert rows == ["| a | **5.000 (n = 1)** |", "| b | 11.0 ± 1.4 (n = 2) |"]
    assert "val\\_sigma" in paper_table(find_runs(tmp_path)[0], "md", metrics=["val_sigma/video_0-0.2"])


def test_a_row_that_begins_with_a_bracket_is_no_option_of_the_rule_above(tmp_path):
    folder(tmp_path / "a", label="[0,3]*|")
    row = paper_table(find_runs(tmp_path)[0], "latex").split("\\midrule\n")[1].strip()
    assert row.startswith(r"{[}0,3{]}{*}\textbar{} & ")


@pytest.mark.parametrize("word", ["\\alpha", "50%_{x}", "a&b#c$d", "~^<>"])
def test_latex_words_are_escaped(word, tmp_path):
    folder(tmp_path / "a", label=word)
    line = paper_table(find_runs(tmp_path)[0], "latex").split("\\midrule\n")[1].splitlines()[0]
    bare = re.sub(r"\\text\w+\{\}|\\[{}$&#_%]", "", line.split(" & ")[0])
    assert not set(bare) & set("\\{}$&#_%~^<>")


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_writes_pages_and_prints_tables(swept_runs, tmp_path, capsys):
    out = tmp_path / "deep" / "page.html"
    main([str(swept_runs), f"out={out}", "--title", "A title", "metric=loss", "media=none"])
    assert capsys.readouterr().out.strip() == str(out)
    text = out.read_text()
    assert "<title>A title</title>" in text
    assert f'"main":"{LOSS}"' in text
    main([str(swept_runs / "fusion=ovi_seed0"), str(swept_runs / "fusion=none_seed0"), "--format=md", "metric=loss"])
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[2:4]] == [
        "| fusion=ovi",
        "| fusion=none",
    ]
    main([f"{swept_runs}/fusion=o*", "media=none"])  # a pattern is no folder to write to
    assert capsys.readouterr().out.strip() == str(swept_runs / "report.html")
    assert not list(swept_runs.glob("fusion=o[*]"))
    main([])
    assert "format=html" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["metrc=loss"], r"does not take 'metrc=loss'. Did you mean 'metric'"),
        (["format=pdf"], r"format must be html, md or latex, got 'pdf'"),
        (["media=cloud"], r"media must be one of embed, link, none, got 'cloud'"),
        (["prompts=0"], r"prompts must be above 0, got 0"),
        (["max_mb=lots"], r"max_mb cannot be 'lots'"),
        (["spread=std"], r"spread: format=html has no such setting"),
        (["format=md", "prompts=3"], r"prompts: format=md has no such setting"),
        (["/no/such/folder"], r"/no/such/folder: there is no such folder"),
    ],
)
def test_words_that_mean_nothing_are_named(swept_runs, words, message):
    with pytest.raises(OviError, match=message):
        main([str(swept_runs), *words])


def test_the_readme_uses_words_that_exist():
    """Of this command and of ``ovi compare``, whose options are named alike."""
    lines = [
        line.split("#")[0].split() for line in README.splitlines() if line.startswith(("ovi report", "ovi compare"))
    ]
    assert {line[1] for line in lines} == {"report", "compare"}
    for _, command, *words in lines:
        if command == "compare":
            assert len(_split(words)[0]) == 2
        else:
            assert _parse(words)[0]
    assert _parse(["x", "metric=val/loss"])[1] == {"metric": ["val/loss"]}
    assert _split(["a", "b", "metric=val/loss"])[1] == {"metric": "val/loss"}


def test_a_folder_without_runs_and_one_of_spoilt_runs(tmp_path):
    with pytest.raises(OviError, match="no runs in"):
        main([str(tmp_path)])
    spoilt = folder(tmp_path / "run")
    (spoilt / "run.json").write_text("{")
    with pytest.raises(OviError, match=r"run\.json: cannot be read"):
        main([str(tmp_path)])
