"""Numbers in the README are those of the committed result file."""

import json
from pathlib import Path

import pytest

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
