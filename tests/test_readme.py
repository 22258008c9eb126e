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
