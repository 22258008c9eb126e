"""Numbers in the README are those of the committed result file."""

import json
import statistics
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

from ovi.runs.intervals import holm

ROOT = Path(__file__).parents[1]
RESULT = json.loads((ROOT / "benchmarks" / "results" / "demo_ablation.json").read_text())


@pytest.mark.parametrize("name", RESULT["rows"])
def test_the_demo_table_is_the_measured_one(name):
    figures = RESULT["rows"][name]["figures"]
    line = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| {name} "))
    assert f"| {figures['impact_offset_ms']:.0f} ms |" in line
    assert f"| {figures['impact_offset_coverage']:.0%} of {figures['impact_offset_n']:.0f} |" in line
    assert f"| {figures['impact_offset_match_rate']:.0%} |" in line


def test_the_result_proves_the_claim():
    """Aligned clips are in time, the others are at chance: what the README says of the table."""
    offset = {name: row["figures"]["impact_offset_ms"] for name, row in RESULT["rows"].items()}
    assert offset["aligned"] <= 40
    assert min(offset["unaligned"], offset["no fusion"]) >= 120


SPEED = {"ovi": "ovi", "ovi, `compile=true`": "ovi_compiled", "LTX-2 (diffusers)": "ltx2",
         "Kandinsky 6 (diffusers)": "kandinsky6"}  # fmt: skip


def result(name):
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text())


@pytest.mark.parametrize("title", SPEED)
def test_the_speed_table_is_the_measured_one(title):
    model = result("twin_cpu.json")["models"][SPEED[title]]
    figures = (model["forward"]["speed"], model["step"]["speed"], model["memory"]["memory"])
    line = f"| {title} | " + " | ".join(f"{x:.2f}x" for x in figures) + " |"
    assert line in (ROOT / "README.md").read_text()


def test_the_speed_with_long_prompts_is_the_measured_one():
    model = result("twin_cpu_long_prompt.json")["models"]["ovi"]
    text = " ".join((ROOT / "README.md").read_text().split())
    speeds = model["forward"]["speed"], model["step"]["speed"], model["memory"]["memory"]
    assert "it is {:.2f}x, {:.2f}x and {:.2f}x".format(*speeds) in text


def test_both_programs_computed_the_same():
    for name in ("twin_cpu.json", "twin_cpu_long_prompt.json"):
        assert max(result(name)["agreement"][m]["max_difference"] for m in ("video", "audio")) < 1e-4


def test_the_words_on_reading_are_the_measured_ones():
    readers = result("data_cpu.json")["readers"]

    def rate(name):
        return statistics.median(readers[name]["samples_per_s"])

    def share(base, workers=2, reader="ovi"):
        mine = readers[f"{reader}, {workers}"]
        pairs = zip(mine["samples_per_s"], mine[f"{base}_samples_per_s"])
        return statistics.median(mine / theirs for mine, theirs in pairs)

    first, peers = "ovi, first epoch, 2", [n for n in readers if n.endswith(", 2") and not n.startswith("ovi")]
    text = " ".join((ROOT / "README.md").read_text().split())
    for words in (
        f"hand over {rate('ovi, 2'):.0f} samples/s",
        f"{share('raw_tar'):.1f}x what a plain `DataLoader`",
        f"without loading processes it is {share('raw_tar', 0):.1f}x)",
        f"{rate('ovi, 2') / max(map(rate, peers)):.1f}x the best of",
        f"{share('read_through'):.2f}x what one process takes out",
        f"({share('dropped'):.2f}x of two such",
        f"it is {rate(first) / rate('ovi, 2'):.2f}x as fast as after it, "
        f"{share('read_through', reader='ovi, first epoch'):.2f}x the one process that throws away",
        f"{rate('ovi, 0') / rate('litdata, 0'):.2f}x litdata",
        f"in {readers['ovi, 2']['first_batch_s']:.2f} s",
        f"{min(readers[name]['first_batch_s'] for name in peers):.1f} s and more",
        f"at {result('encode_cpu.json')['reading_against_plain_decoding']:.2f}x of PyAV's plain decoding",
    ):
        assert words in text, words
    assert len(peers) == 3


def test_the_memory_of_the_video_codec_is_the_measured_one():
    found = result("codec_memory_cpu.json")
    rows = [row for row in found["rows"] if row["tile"] in (None, 768)]  # as configured
    peak = {what: max(row["peak_gib"] for row in rows if row["what"] == what) for what in ("encode", "decode")}
    said = f"takes {peak['encode']:.1f} GiB to encode and {peak['decode']:.1f} GiB to decode"
    assert said in " ".join((ROOT / "README.md").read_text().split())
    assert found["size"] == [704, 1280]
    assert round(found["parameters"] / 1e6) == 705


STUDY = pd.read_csv(
    ROOT / "benchmarks" / "results" / "study_fusion_alignment.csv", keep_default_na=False, na_values=[""]
)


FUSIONS = sorted({label.partition("/")[0] for label in STUDY["label"]})


def study(fusion, alignment, tag):
    return STUDY.loc[STUDY["label"] == f"{fusion}/{alignment}", tag]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_study_table_is_the_measured_one(fusion):
    cells = [f"`{fusion}`"]
    for alignment in ("seconds", "none"):
        offset = study(fusion, alignment, "val/impact_offset_ms")
        half = stats.t.ppf(0.975, len(offset) - 1) * offset.std(ddof=1) / len(offset) ** 0.5
        cells.append(f"{offset.mean():.0f} ± {half:.0f} ms")
        assert sorted(study(fusion, alignment, "seed")) == [0, 1, 2]
    for tag, form in (("impact_offset_match_rate", ".0%"), ("loss_video", ".3f"), ("loss_audio", ".3f")):
        cells.append(" / ".join(format(study(fusion, a, f"val/{tag}").mean(), form) for a in ("seconds", "none")))
    cells.append(f"{study(fusion, 'seconds', 'flops').mean() / 1e12:.1f} TFLOP")
    assert f"| {' | '.join(cells)} |" in (ROOT / "README.md").read_text()


ALIGNED, EXCHANGED = "shared clock against unaligned", "against no exchange, shared clock"
CONCLUSIONS = {
    (ALIGNED, "bridge"): "{:.0f} ms less for `bridge` ({:.0f} to {:.0f}",
    (ALIGNED, "ovi"): "{:.0f} ms less for `ovi` ({:.0f} to {:.0f}",
    (EXCHANGED, "bridge"): "`bridge` {:.0f} ms ({:.0f} to {:.0f})",
    (EXCHANGED, "ovi"): "`ovi` {:.0f} ms ({:.0f} to {:.0f})",
}


@pytest.mark.parametrize(("question", "words"), CONCLUSIONS.items(), ids=lambda v: " ".join(v)[:40])
def test_what_the_study_concludes_is_what_was_compared(question, words):
    found = result("study_fusion_alignment.json")["comparisons"][question[0]][question[1]]
    figure = found["figures"][0]
    interval = figure["over_trainings"]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert words.format(-figure["difference"], -interval["high"], -interval["low"]) in text
    assert figure["real"]
    assert (found["p_of_all"] < 0.05) == (question != (ALIGNED, "ovi")), "what the README says of the corrected ones"
    other = f"{question[1]}/none" if question[0] == ALIGNED else "none/seconds"
    offsets = STUDY.groupby("label")["val/impact_offset_ms"].mean()  # of clips that need not be pairs
    assert figure["difference"] == pytest.approx(offsets[f"{question[1]}/seconds"] - offsets[other], abs=40)


def test_every_training_with_the_clock_is_ahead_of_every_one_without():
    with_it, without = (
        pd.concat([study(fusion, alignment, "val/impact_offset_ms") for fusion in ("bridge", "bridge_mova", "ovi")])
        for alignment in ("seconds", "none")
    )
    assert len(with_it) == len(without) == 9
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"with it lie between {with_it.min():.0f} and {with_it.max():.0f} ms" in text
    assert f"all nine without it between {without.min():.0f} and {without.max():.0f} ms" in text
    costs = STUDY.groupby("label")["flops"].mean()
    most = max(costs[label] for label in costs.index if label.endswith("/seconds")) / costs["none/seconds"] - 1
    assert f"up to {most:.0%}".replace("%", " %") + " more operations" in text


def test_what_holds_when_both_questions_are_corrected_for_at_once():
    both = result("study_fusion_alignment.json")["comparisons"]
    asked = {(q, fusion): found["figures"][0]["p"] for q, of in both.items() for fusion, found in of.items()}
    corrected = dict(zip(asked, holm(list(asked.values()))))
    assert {which for which, p in corrected.items() if p < 0.05} == {(EXCHANGED, "bridge"), (EXCHANGED, "ovi")}
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"`bridge`'s gain from the clock: p {corrected[ALIGNED, 'bridge']:.2f})" in text
