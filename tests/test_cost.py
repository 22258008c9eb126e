"""``ovi list fusion --cost``: what is counted is what the mathematics says."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from ovi.clock import Clock
from ovi.commands.cost import DEMO, MOST_FLOPS, Size, costs, table
from ovi.commands.main import main
from ovi.fusion import FUSIONS
from ovi.layout import LatentLayout
from ovi.recompute import RECOMPUTES
from small_twins import twin

SIZE = Size(LatentLayout(4, 6, 8, 5, Clock(fps=8, video_stride=1, causal_first_frame=False)), (4, 4, 4), 9, 5, batch=2)
D, PAIRS, VIDEO, AUDIO = 24, 2, 4 * 2 * 2, 9


def counted(size=SIZE, **knobs):
    return costs(FUSIONS, lambda name: twin(name, layout=size.layout, **knobs), size, rounds=0)


def test_operations_and_parameters_of_the_exchange():
    """Ovi's exchange: keys and values of both directions, and two attentions."""
    found = counted()
    assert set(found) == set(FUSIONS)
    projections = 2 * 2 * (VIDEO + AUDIO) * D * D
    attentions = 2 * 4 * VIDEO * AUDIO * D
    more = found["ovi"].forward_flops - found["none"].forward_flops
    assert more == SIZE.batch * PAIRS * (projections + attentions)
    assert found["ovi"].parameters == PAIRS * (4 * D * D + 10 * D)
    assert found["none"].parameters == 0
    assert all(c.step_flops > 2.5 * c.forward_flops for c in found.values())


@pytest.mark.slow
def test_memory_grows_with_the_batch_and_shrinks_when_recomputed():
    one, two = counted(replace(SIZE, batch=4))["ovi"], counted(replace(SIZE, batch=8))["ovi"]
    assert two.activation_bytes == pytest.approx(2 * one.activation_bytes, rel=0.15)
    # Saved by checkpointing: the pair's input alone; what the head and the embeddings keep stays.
    assert counted(recompute=RECOMPUTES["block"]())["ovi"].activation_bytes < 0.5 * counted()["ovi"].activation_bytes


def test_no_scores_are_kept():
    """Eight times the tokens keep about eight times the bytes: attention is counted as a kernel that stores none."""
    few, many = (counted(replace(SIZE, latent=(n, 4, 4)))["none"].activation_bytes for n in (8, 64))
    assert many < 8.5 * few


def test_a_strategy_that_the_model_does_not_take_says_why():
    found = counted(audio_tower={"num_heads": 1}, tower={"num_heads": 2})
    rows = {row["name"]: row for row in table(found, SIZE)}
    assert all(bool(row["error"]) != ("flops_ratio" in row) for row in rows.values())


def test_times_are_measured_in_turns(monkeypatch):
    found = costs(FUSIONS, lambda name: twin(name), SIZE, rounds=2)
    rows = table(found, SIZE)
    assert rows[0]["name"] == "none"
    assert 0.2 < rows[0]["forward_ratio"] < 5
    assert all(len(row["forward_s"]) == len(row["step_s"]) == 2 for row in rows)
    assert DEMO.batch * 1e9 < MOST_FLOPS


@pytest.mark.slow
def test_the_command(capsys):
    overrides = ["model.video.dim=24", "model.video.num_heads=2", "model.video.num_blocks=1", "model.video.ffn_dim=24"]
    main(["list", "fusion", "--cost", "--rounds", "0", "--json", *overrides])
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} == set(FUSIONS)
    main(["list", "fusion", "--cost", "--rounds", "0", *overrides])
    assert "kept for backward" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["list", "tower", "--cost"], "not for 'tower'"),
        (["list", "fusion", "model=ovi_720p_5s"], "go with --cost"),
        (["list", "fusion", "--cost", "model.fusion.zero_init=true"], "zero_init"),
        (["list", "fusion", "--cost", "model=nonsense"], "nonsense"),
    ],
)
def test_bad_requests_are_named(words, says):
    code = "import sys; from ovi.commands.main import main; main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr
