"""The benchmark's own arithmetic, and that it runs with every peer."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import bench_twin  # noqa: E402
import flops  # noqa: E402
import memory  # noqa: E402
import ours  # noqa: E402
import ovi  # noqa: E402
import reference  # noqa: E402
import timing  # noqa: E402
import work  # noqa: E402
from candidate import Candidate  # noqa: E402
from floor import H100, computed_floor  # noqa: E402
from measure import KINDS, operations, peaks  # noqa: E402
from ovi.errors import OviError  # noqa: E402
from peers import PEERS  # noqa: E402
from setting import PRESETS, Batch  # noqa: E402

SMOKE = PRESETS["smoke"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "smoke.json"
    command = [sys.executable, str(BENCHMARKS / "bench_twin.py"), "--smoke", "--out", str(out)]
    subprocess.run(command, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert list(out.parent.iterdir()) == [out]
    return json.loads(out.read_text())


def tower_flops(s, tokens, conv, values, *, step):
    """Forward (or forward and backward) of one tower, summed by hand; ``conv`` and ``values`` by its patch."""
    d, text, rows = s.width, s.batch * 512, s.batch * tokens
    first = s.batch * 256 * d + text * 4096 * d + rows * conv[0] * d  # their inputs need no gradient
    rest = s.batch * 7 * d * d + text * d * d + rows * conv[1] + rows * d * values
    attention = 2 * rows * d * (tokens + 512)
    block = 6 * rows * d * d + 2 * text * d * d + 2 * rows * d * s.ffn + attention
    return 2 * (first * (2 if step else 1) + (rest + s.layers * block) * (3 if step else 1))


def twin_flops(s, *, step):
    video, audio, d = s.video_tokens, s.audio_tokens, s.width
    hidden = {64: 256, 3072: 8192}[d]
    towers = tower_flops(s, video, (192, 0), 192, step=step) + tower_flops(
        s, audio, (7 * 20, 3 * 7 * d * hidden), 20, step=step
    )
    exchange = 2 * s.batch * (video + audio) * d * d + 4 * s.batch * video * audio * d
    return towers + 2 * s.layers * exchange * (3 if step else 1)


@pytest.mark.slow
def test_smoke_runs_every_peer(result):
    assert set(result["models"]) == {"ovi", "ovi_video", *PEERS}
    for figures in result["models"].values():
        assert figures["differs"]
        for kind in KINDS:
            found = figures[kind]
            assert len(found["times_s"]) == 1
            assert found["min_s"] <= found["median_s"] <= found["max_s"]
            assert found["share_of_peak"] > 0
            assert found["flops_per_s"] == pytest.approx(figures["flops"][kind] / found["median_s"])
    assert {f["task"]: f["baseline"] for f in result["models"].values()} == {"joint": "ltx2", "video": "wan"}
    for name in ("ltx2", "wan"):
        assert result["models"][name]["forward"]["speed"] == 1
        assert result["models"][name]["memory"]["memory"] == 1


def test_counted_flops_are_those_of_the_closed_form():
    s = replace(SMOKE, text_tokens=512)  # nothing to save on padding
    model, batch = ours.twin(s), Batch.random(s)
    joint, video = operations(ours.joint(model, s, batch)), operations(ours.video_alone(model, s, batch))
    for kind in KINDS:
        step = kind == "step"
        assert joint[kind] == pytest.approx(twin_flops(s, step=step), rel=0.01)
        assert video[kind] == pytest.approx(tower_flops(s, 8, (192, 0), 192, step=step), rel=0.01)
        assert joint["published"][kind] == twin_flops(s, step=step)


def test_peers_are_of_our_size(result):
    models = result["models"]
    for kind in KINDS:
        published = models["ovi"]["flops"]["published"][kind]
        assert models["ovi"]["flops"][kind] <= published
        assert models["wan"]["flops"][kind] == models["ovi_video"]["flops"]["published"][kind]
        for name in ("ltx2", "kandinsky6"):
            assert models[name]["flops"][kind] == pytest.approx(published, rel=0.05)
    assert models["wan"]["parameters"] == models["ovi_video"]["parameters"]


def test_memory_is_positive_and_grows_with_the_batch(result):
    for figures in result["models"].values():
        found = figures["memory"]
        assert 0 < found["forward_bytes"] < found["step_bytes"]
    one, three = (peaks(ours.joint(ours.twin(s), s, Batch.random(s)), "cpu") for s in (SMOKE, replace(SMOKE, batch=3)))
    assert all(one[kind] < three[kind] for kind in one)


def test_peak_is_the_most_held_at_once():
    n = 250_000
    x, kept = torch.ones(n), [torch.ones(n)]

    def chain():
        a = x + 1
        b = a * 2
        del a
        c = b * 3
        return c * 2, kept.clear()  # b, c and the result: three at once; what was there before does not count

    assert 3 * 4 * n <= memory.peak_bytes(chain, "cpu") < 3 * 4 * n + 1000
    assert memory.highest_sum([5, -3, 4, -6, 1]) == 6
    assert memory.highest_sum([-5, 3]) == 0


def test_peak_of_a_step_counts_what_is_kept_for_the_backward_pass():
    n = 100_000
    x = torch.zeros(n, requires_grad=True)

    def peak(layers):
        def step():
            y = x
            for _ in range(layers):
                y = y.exp()  # keeps its result
            y.sum().backward()

        return memory.peak_bytes(step, "cpu")

    assert peak(7) - peak(4) == 3 * 4 * n


def test_gradients_given_before_a_step_do_not_count():
    model = torch.nn.Linear(400, 400, bias=False)
    memory.allocate_gradients(model)
    given = model.weight.grad
    (model(torch.ones(3, 400)).sum()).backward()
    assert model.weight.grad is given  # added to in place
    assert torch.equal(given, torch.full((400, 400), 3.0))


def test_tasks_take_turns_and_only_their_own_time_counts():
    now, order = [0.0], []

    def passing(name, seconds):
        def act():
            order.append(name)
            now[0] += seconds

        return act

    tasks = {
        "a": timing.Task(passing("a", 1), before=passing("before a", 10)),
        "b": timing.Task(passing("b", 2), after=passing("after b", 20)),
    }
    times = timing.interleaved(tasks, rounds=2, warmup=1, clock=lambda: now[0])
    assert times == {"a": [1, 1], "b": [2, 2]}
    assert order == ["before a", "a", "b", "after b"] * 3


def test_summary_and_speed():
    found = timing.summary([4.0, 1.0, 100.0, 2.0, 3.0])
    assert (found["median_s"], found["min_s"], found["max_s"], found["iqr_s"]) == (3, 1, 100, 2)
    assert timing.summary([2.0])["iqr_s"] == 0
    # A slow round slows both: round by round this one is twice as fast.
    assert timing.speed([1, 5, 3], baseline=[2, 10, 6]) == 2


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], ids=str)
def test_attention_is_counted_alike_whichever_kernel_runs(backend):
    q, k = torch.randn(2, 3, 40, 16, requires_grad=True), torch.randn(2, 3, 24, 16, requires_grad=True)

    def both():
        F.scaled_dot_product_attention(q, k, k).sum().backward()

    with sdpa_kernel(backend):
        assert sum(flops.by_operation(both).values()) == 3 * 4 * 2 * 3 * 40 * 24 * 16


def test_attention_that_the_counter_does_not_see_comes_from_the_closed_form():
    class Hidden(torch.autograd.Function):  # stands for a kernel of another package
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    layer = torch.nn.Linear(8, 8)
    known = (work.Product(4, 8, 8, input_gradient=False), work.Attention(heads=2, queries=4, keys=4, width=4))
    candidate = Candidate(layer, lambda: (Hidden.apply(layer(torch.ones(4, 8))),), "joint", "", known)
    found = operations(candidate)
    assert found["from"] == "counter, attention from the closed form"
    assert (found["forward"], found["step"]) == (2 * 4 * 64 + 512, 2 * 2 * 4 * 64 + 3 * 512)
    assert (found["forward"], found["step"]) == tuple(found["published"][kind] for kind in KINDS)


def test_the_floor_is_computed_for_the_published_size():
    four = PRESETS["gpu"]
    assert four.video_tokens == 31 * 22 * 23
    floor = computed_floor()
    assert floor["computed, not measured"] is True
    for name, setting in (("4 layers", four), ("30 layers", replace(four, layers=30))):
        found = floor["settings"][name]
        for kind in KINDS:
            assert found[kind]["flops"] == pytest.approx(twin_flops(setting, step=kind == "step"), rel=1e-3)
            assert found[kind]["floor_s"] >= found[kind]["flops"] / H100.flops_per_s
        weights = 2 * 11.66e9 if name == "30 layers" else 0
        assert found["forward"]["bytes"] > weights


def test_bytes_of_a_product_and_an_attention():
    product = work.Product(rows=2, inner=3, columns=5)
    assert (product.forward_flops, product.backward_flops) == (60, 120)
    assert product.forward_elements == 6 + 15 + 10
    assert work.Product(2, 3, 5, input_gradient=False).backward_flops == 60
    attention = work.Attention(heads=2, queries=4, keys=3, width=8)
    assert attention.forward_elements == 2 * 8 * (4 + 3 + 3 + 4)


def test_sizes_follow_the_width():
    def setting(*words):
        return bench_twin.setting_of(bench_twin.parser().parse_args(words))

    assert setting() == PRESETS["cpu"]
    wide = setting("--width", "3072", "--latent", "1", "2", "2")
    assert (wide.heads, wide.ffn, wide.video_tokens) == (24, 14336, 1)
    assert (setting("--width", "512").heads, setting("--width", "512", "--head-dim", "32").heads) == (8, 16)
    with pytest.raises(OviError, match="--latent"):
        setting("--latent", "2", "5", "4")
    with pytest.raises(OviError, match="--text-tokens"):
        setting("--text-tokens", "513")
    with pytest.raises(OviError, match="float32"):
        _ = setting("--dtype", "float23").torch_dtype


def checkout(folder, **files):
    modules = folder / "ovi" / "modules"
    modules.mkdir(parents=True)
    for name, text in files.items():
        (modules / f"{name}.py").write_text(text)
    return folder


def test_the_original_is_loaded_beside_ours(tmp_path):
    fusion = """
import ovi.modules.model
from ovi.modules.model import WIDTH
from .model import WIDTH as again
class FusionModel:
    found = (ovi.modules.model.WIDTH, WIDTH, again)
    def late(self):
        from ovi.modules.late import NAME
        return NAME
"""
    before = {n for n in sys.modules if n == "ovi" or n.startswith("ovi.")}
    root = checkout(tmp_path / "a", fusion=fusion, model="WIDTH = 7", late="NAME = __name__")
    theirs = reference.fusion_model(root)
    assert theirs.found == (7, 7, 7)
    assert theirs().late() == "ovi_reference.modules.late"
    assert {n for n in sys.modules if n == "ovi" or n.startswith("ovi.")} == before
    assert sys.modules["ovi"] is ovi
    assert not list(root.rglob("__pycache__"))
    other = checkout(tmp_path / "b", fusion=fusion, model="WIDTH = 8")
    assert reference.fusion_model(other).found == (8, 8, 8)


def test_a_checkout_that_cannot_be_used_says_why(tmp_path):
    with pytest.raises(OviError, match=r"fusion\.py is not there"):
        reference.fusion_model(tmp_path)
    with pytest.raises(OviError, match="no_such_package"):
        reference.fusion_model(checkout(tmp_path / "a", fusion="import no_such_package"))


@pytest.mark.skipif("OVI_REFERENCE" not in os.environ, reason="OVI_REFERENCE names no checkout of the original")
def test_ours_computes_what_the_original_does():
    setting = replace(SMOKE, batch=2)
    batch, model = Batch.random(setting), ours.twin(setting)
    mine = ours.joint(model, setting, batch)
    theirs = reference.original(setting, batch, Path(os.environ["OVI_REFERENCE"]), model)
    found = reference.agreement(mine, theirs, torch.float32)
    assert all(f["max_difference"] < 2e-5 < f["max_output"] for f in found.values())
    assert operations(theirs)["from"] == "counter"
    assert operations(theirs)["forward"] == operations(theirs)["published"]["forward"]
    for p in model.parameters():
        p.data.add_(0.01)
    with pytest.raises(OviError, match="do not compute the same thing"):
        reference.agreement(mine, theirs, torch.float32)
