"""Benchmarks that no other test runs still do, small: what they measure changes under them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bench_data", "bench_encode", "bench_codec_memory"])
def test_the_small_run_works_and_keeps_its_result(name, tmp_path):
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--smoke", "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "out.json").read_text())["machine"]["cpus"]
