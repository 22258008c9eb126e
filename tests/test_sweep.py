"""Sweeps: what is planned, refused before the first run, done again, and that runs differ in nothing else."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import ovi
import ovi.conf
import ovi.training.module as module_file
from latent_sets import write_set
from ovi.commands import calibration
from ovi.commands.budget import apply_budget, batches_of, read_budget, rounds
from ovi.commands.sweep import main
from ovi.commands.sweeping.arguments import merged, sort_arguments
from ovi.commands.sweeping.plan import _seeds
from ovi.commands.sweeping.variants import literal, variants_of
from ovi.errors import OviError
from ovi.fusion import FUSIONS
from ovi.fusion.none import NoFusion
from ovi.runs.run import find_runs
from ovi.runs.table import read_table

SWEEPS = Path(ovi.conf.__path__[0]) / "sweep"
SMALL = ["model.video.dim=24", "model.video.num_heads=2", "model.video.num_blocks=1", "model.video.ffn_dim=32"]
QUIET = ["callbacks.joint_eval=null", "callbacks.attention_in_time=null", "callbacks.progress=null"]
QUIET += [
    "callbacks.sigma_losses=null",
    "callbacks.dashboard=null",
    "logger.tensorboard=null",
    "+trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
]
TWO = "axes={model/fusion: [none, film]}"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    write_set(folder, {"train": [6], "val": [2]})
    return folder


@pytest.fixture
def sweep(shards, tmp_path, monkeypatch):
    """``ovi sweep`` in this process, with a small twin and two steps; its folder of runs."""
    monkeypatch.chdir(tmp_path)

    def call(*words, steps="budget.steps=2", name="s", without=()):
        base = [f"data.path={shards}", "data.batch_size=2", "data.num_workers=0", *SMALL, *QUIET]
        main([*(w for w in base if w.split("=")[0] not in {*without, *(x.split("=")[0] for x in words)}),
              *([steps] if steps else []), f"name={name}", *words])  # fmt: skip
        return tmp_path / "runs" / name

    return call


@pytest.fixture
def refused(sweep, capsys, tmp_path):
    """The message of a sweep that ends before its first run."""

    def call(*words, runs=0, **options):
        with pytest.raises(SystemExit) as stop:
            sweep(*words, **options)
        assert stop.value.code == 1
        assert len(find_runs(tmp_path)[0]) == runs
        return capsys.readouterr().err

    return call


@pytest.mark.slow
def test_a_sweep_from_a_program_is_that_of_the_command(shards, tmp_path, monkeypatch, sweep):
    monkeypatch.chdir(tmp_path)
    base = [f"data.path={shards}", "data.batch_size=2", "data.num_workers=0", *SMALL, *QUIET]
    table = ovi.sweep(*base, TWO, "seeds=[0]", "budget.steps=2", "name=program")
    assert list(table.label) == ["none", "film"]
    assert list(table.status) == ["finished"] * 2
    command = read_table(sweep(TWO, "seeds=[0]", name="command")).set_index("label")
    for label, row in table.set_index("label").iterrows():
        assert row["val/loss"] == command.loc[label, "val/loss"]
    began = {run.folder: (run.folder / "summary.json").stat().st_mtime_ns for run in find_runs(tmp_path)[0]}
    assert ovi.sweep(*base, TWO, "seeds=[0]", "budget.steps=2", "name=program").equals(table)
    assert {path: (path / "summary.json").stat().st_mtime_ns for path in began} == began
    for words, message in ((["axes={model/fusion: [ovy]}"], "Did you mean 'ovi'"), (["--multirun"], "flags")):
        with pytest.raises(OviError, match=message):
            ovi.sweep(*base, *words)
    assert not GlobalHydra.instance().is_initialized()


def statuses(folder):
    return {run.folder.name: run.status for run in find_runs(folder)[0]}


class TestVariants:
    def of(self, axes, crossed=True):
        groups = {"model/fusion": ["none", "ovi"], "optim": ["adamw", "muon"]}
        found = variants_of(axes, lambda g: groups.get(g, []), list(groups), crossed=crossed)
        return {v.label: list(v.overrides) for v in found}

    def test_forms(self):
        assert self.of({"model/fusion": "all"}) == {"none": ["model/fusion=none"], "ovi": ["model/fusion=ovi"]}
        assert self.of({"optim": ["muon"]}) == {"muon": ["optim=muon"]}
        assert self.of({"model.plan": ["every:2", [0, 3]]}) == {
            "plan=every:2": ["model.plan=every:2"],
            "plan=[0,3]": ["model.plan=[0,3]"],
        }
        axis = {"a": [], "b": ["k=1", "l=2"], "c": {"k": 1, "g": "none"}}
        assert self.of({"x": axis}) == {"a": [], "b": ["k=1", "l=2"], "c": ["k=1", "g=none"]}

    def test_crossed_and_one_by_one(self):
        axes = {"optim": "all", "d": {"shallow": ["model.plan=first:1"], "deep": []}}
        assert list(self.of(axes)) == ["adamw/shallow", "adamw/deep", "muon/shallow", "muon/deep"]
        assert self.of(axes)["muon/shallow"] == ["optim=muon", "model.plan=first:1"]
        assert list(self.of(axes, crossed=False)) == ["adamw", "muon", "shallow", "deep"]

    @pytest.mark.parametrize(
        ("axes", "words"),
        [
            ({"model/fusion": ["ovi", "ovi"]}, "'ovi' twice"),
            ({"model/fusion": ["ovy"]}, "Did you mean 'ovi'"),
            ({"model/fuson": "all"}, "Did you mean 'model/fusion'"),
            ({"x": {}}, "axes.x has no values"),
            ({"x": 3}, "axes.x is"),
            ({"x": {"a": "fusion"}}, "list of overrides"),
            ({"x": {"a": ["k=1"]}, "y": {"b": ["k=2"]}}, "both|two of them set k"),
            ({"x": {"a b": [], "a-b": []}}, "cannot be told apart"),
            ({}, "nothing to vary"),
        ],
    )
    def test_refuses(self, axes, words):
        with pytest.raises(OviError, match=words):
            self.of(axes)

    @pytest.mark.parametrize(
        "value",
        [None, True, 3, 1e-05, "every:2", "a b, 'c'", "null", [1, "x"], {"a": [1.5]}, "1e3", "", r"a\b", "1\\", r"\'"],
    )
    def test_values_survive_hydras_grammar(self, value):
        from hydra.core.override_parser.overrides_parser import OverridesParser

        (parsed,) = OverridesParser.create().parse_overrides([f"k={literal(value)}"])
        assert parsed.value() == value

    def test_sorting_a_command_line(self):
        words = ["sweep=fusion", "experiment=demo", "axes={a: [1]}", "launcher=ray", "hydra.launcher.n_jobs=2", "-h"]
        found = sort_arguments([*words, "model/fusion=ovi", "~callbacks.ema"])
        assert found.own == ("sweep=fusion", "++axes={a: [1]}", "-h")
        assert found.of_runs == ("experiment=demo", "model/fusion=ovi", "~callbacks.ema")
        assert (found.of_launcher, found.launcher) == (("hydra.launcher.n_jobs=2",), "ray")
        assert merged(["a=1", "+b=2"], ["a=3"]) == ["+b=2", "a=3"]


@pytest.mark.parametrize(("steps", "interval", "exact", "expected"), [
    (1100, 550, True, (1100, 550)), (600, 550, True, (600, 600)), (997, 550, True, (997, 997)),
    (900, 250, True, (900, 225)), (3, 550, False, (3, 3)), (1003, 250, False, (1000, 250)),
])  # fmt: skip
def test_validation_falls_on_the_end(steps, interval, exact, expected):
    assert rounds(steps, interval, exact=exact) == expected


@pytest.mark.parametrize(("steps", "each", "of_epoch"), [(1200, 2, 63), (7, 4, 6), (5, 3, 2), (6, 2, 4)])
def test_steps_of_several_batches_are_counted_in_batches(steps, each, of_epoch):
    """Counted as Lightning does: a step after so many batches, and at the end of an epoch."""
    done = batch = 0
    while done < steps:
        batch += 1
        in_epoch = (batch - 1) % of_epoch + 1
        done += in_epoch % each == 0 or in_epoch == of_epoch
    assert batches_of(steps, each, of_epoch) == batch
    trainer = {"max_steps": 9, "val_check_interval": steps * each, "accumulate_grad_batches": each}
    config = OmegaConf.create({"budget": {"steps": steps}, "trainer": trainer, "callbacks": {}})
    apply_budget(config, lambda: 1.0, lambda: 1.0, lambda: of_epoch)
    assert (config.trainer.max_steps, config.trainer.val_check_interval) == (steps, batch)
    assert batches_of(steps, each, None) == steps * each


@pytest.mark.slow
def test_a_run_whose_epochs_end_within_a_step_is_validated_at_its_end(sweep):
    """Three batches an epoch, two a step: three steps are five batches."""
    folder = sweep("axes={model/fusion: [none]}", "trainer.accumulate_grad_batches=2", steps="budget.steps=3")
    (run,) = find_runs(folder)[0]
    assert run.summary["steps"] == 3
    assert "val/loss" in run.metrics


def test_operations_of_a_step_count_what_is_trained(shards):
    """A frozen linear layer of n x m needs no gradient of its weights: 2 n m operations a token fewer."""
    from hydra import compose, initialize_config_module
    from hydra.utils import instantiate

    from ovi.commands.components import load_components, store_components
    from ovi.commands.step_flops import step_flops
    from ovi.commands.train import num_processes

    load_components()
    store_components()
    words = [f"data.path={shards}", "data.batch_size=2", *SMALL]
    with initialize_config_module("ovi.conf", version_base="1.3"):
        whole, frozen, twice = (
            compose("train", overrides=[*words, *more])
            for more in ([], ["optim.frozen=['*.ffn']"], ["trainer.accumulate_grad_batches=2"])
        )
    data = instantiate(whole.data, _convert_="all")
    num_video, num_audio = 8 * (2 // 2) * (2 // 2), 31
    saved = 2 * (24 * 32 * 2) * (num_video + num_audio) * 2
    assert step_flops(whole, data) - step_flops(frozen, data) == saved
    assert step_flops(twice, data) == 2 * step_flops(whole, data)
    OmegaConf.set_struct(whole, False)
    whole.trainer.update(accelerator="cpu", devices=3, strategy="ddp")
    assert num_processes(whole) == 3


@pytest.mark.slow
def test_a_sweep_its_table_and_doing_it_again(sweep, capsys):
    folder = sweep(TWO)
    table = read_table(folder)
    assert sorted(zip(table.label, table.seed)) == [("film", 0), ("none", 0)]
    assert set(table["variant.model/fusion"]) == {"none", "film"}
    assert (table.steps == 2).all()
    assert table.config_hash.nunique() == 2
    run = next(r for r in find_runs(folder)[0] if r.folder.name == "film_seed0")
    assert (run.label, run.seed, run.sweep, run.variant) == ("film", 0, "s", {"model/fusion": "film"})
    assert run.config_hash == run.summary["config_hash"]
    assert run.summary["flops"] == 2 * run.summary["flops_per_step"]
    assert 0 < run.summary["train_seconds"] < run.summary["seconds"]
    # A row whose process was killed before it wrote it, and a run that failed.
    when = (folder / "film_seed0" / "summary.json").stat().st_mtime_ns
    (folder / "results.parquet").unlink()
    table[table.label != "film"].to_csv(folder / "results.csv", index=False)
    broken = folder / "none_seed0"
    (broken / "summary.json").unlink()
    (broken / "failed.json").write_text(json.dumps({"error": "it rained", "traceback": "", "when": ""}))
    (broken / "metrics.jsonl").write_text("of the first try\n")
    capsys.readouterr()
    sweep(TWO, "seeds=[0,1]")
    said = capsys.readouterr().out
    assert "1 finished, 1 failed before" in said
    assert "it rained" in said
    assert (folder / "film_seed0" / "summary.json").stat().st_mtime_ns == when
    assert statuses(folder) == dict.fromkeys(["film_seed0", "film_seed1", "none_seed0", "none_seed1"], "finished")
    assert not (broken / "metrics.jsonl").exists()
    for form in (pd.read_csv(folder / "results.csv"), pd.read_parquet(folder / "results.parquet")):
        assert sorted(zip(form.label, form.seed)) == [("film", 0), ("film", 1), ("none", 0), ("none", 1)]
    assert OmegaConf.load(folder / "sweep.yaml").seeds == [0, 1]


@pytest.mark.slow
def test_variants_see_the_same_samples_and_draws(sweep, monkeypatch):
    """Samples, noise levels and noises of a seed are the same whatever the model, those of another seed are not."""
    seen, errors = {}, module_file.joint_errors

    def spy(network, video, audio, sigma, *, generator, **options):
        if torch.is_grad_enabled():
            state = generator.get_state().clone()
            noise = torch.randn(3, generator=generator)
            generator.set_state(state)
            row = torch.cat([video[:, 0, 0, 0, 0], audio[:, 0, 0], sigma[0], noise])
            seen.setdefault(os.environ["OVI_TEST_RUN"], []).append(row)
        return errors(network, video, audio, sigma, generator=generator, **options)

    from ovi.commands.sweeping.job import Job

    work = Job._work

    def named(self, config, point, folder):
        monkeypatch.setenv("OVI_TEST_RUN", point.run_id)
        work(self, config, point, folder)

    monkeypatch.setattr(module_file, "joint_errors", spy)
    monkeypatch.setattr(Job, "_work", named)
    sweep("axes={model/fusion: [none, bridge]}", "seeds=[0,1]", steps="budget.steps=3")
    runs = {name: torch.stack(rows) for name, rows in seen.items()}
    assert set(runs) == {"none_seed0", "none_seed1", "bridge_seed0", "bridge_seed1"}
    assert runs["none_seed0"].shape[0] == 3
    for seed in (0, 1):
        assert torch.equal(runs[f"none_seed{seed}"], runs[f"bridge_seed{seed}"])
    assert not torch.equal(runs["none_seed0"], runs["none_seed1"])


class Fails(NoFusion):
    """Fails in the first step.

    Args:
        video: block.
        audio: block.
    """

    def forward(self, v, a, video, audio, control):
        raise RuntimeError("a bug in a fusion")


def test_a_run_that_fails_stops_no_other_and_is_named(sweep, refused):
    with FUSIONS.temporary("a_fails", Fails):
        message = refused("axes={model/fusion: [a_fails, none]}", runs=2)
        assert "1 of 2 runs failed" in message
        assert "a bug in a fusion" in message
    folder = sweep("axes={model/fusion: [none]}")
    assert statuses(folder) == {"a_fails_seed0": "failed", "none_seed0": "finished"}
    assert "RuntimeError" in json.loads((folder / "a_fails_seed0" / "failed.json").read_text())["traceback"]
    assert list(read_table(folder).label) == ["none"]


@pytest.mark.parametrize("given", [3, "0,1", [], [1, 1], [True], [0.5], [-1], ["a"], None])
def test_seeds_are_different_whole_numbers(given):
    with pytest.raises(OviError, match="seeds is a list of different whole numbers"):
        _seeds(OmegaConf.create({"seeds": given}).seeds)


@pytest.mark.parametrize("given", [{"steps": 0}, {"steps": 2.5}, {"flops": -1}, {"seconds": "long"}, {"flops": True}])
def test_amounts_of_a_budget(given):
    with pytest.raises(OviError, match=f"budget.{next(iter(given))} is a"):
        read_budget(OmegaConf.create({"budget": given}))


JOINT = "callbacks.joint_eval={num_clips: 2}"


class TestBeforeTheFirstRun:
    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["sweep=fusoin"], "no sweep is called 'fusoin'. Did you mean 'fusion'"),
            ([], "say what to sweep"),
            (["axes={model/fusion: [none, ovy]}"], "Did you mean 'ovi'"),
            (["axes={w: {a: {flow.video_wieght: 1}}}"], "variant 'a' cannot be trained"),
            (["axes={w: {a: [], b: []}}"], "are the same"),
            ([TWO, "seeds=[a]"], "seeds is a list"),
            ([TWO, "seed=3"], "seeds=[3]"),
            ([TWO, "budget.flops=1e9"], "one kind at a time, got steps and flops"),
            ([TWO, "budget.stepps=3"], "budget"),
            ([TWO, "model/fusion=ovi"], "the sweep varies model/fusion"),
            ([TWO, "launcher=jobblib"], "Did you mean 'joblib'"),
            ([TWO, "n_jobs=2"], "launcher=basic works on one run"),
            ([TWO, "retrain=false"], "retrain=false"),
            ([TWO, "axes={model.plan: ['first:9']}"], "cannot be trained"),
            (["axes={model.audio.dim: [20]}"], "a head of 10 dimensions cannot be split"),
            (["axes={model.video.patch.size: [[1, 3, 3]]}"], "does not divide into patches of 3x3"),
            ([TWO, "data.path=nowhere"], "nowhere"),
            ([TWO, "optim.frozen=[vidoe]"], "no weights are called 'vidoe'"),
            ([TWO, "sedes=[1]"], "seeds"),
            ([TWO, "hydra.run.dir=x"], "name="),
            ([TWO, "sweeper=optuna"], "for sweeper=grid"),
            ([TWO, "trainer.devices=2"], "one process on one device"),
            ([TWO, "adapter=lora"], "would be drawn by chance"),
            ([TWO, JOINT, "generation/guidance=cfg", "flow.text_dropout=0"], "know what no text means"),
        ],
        ids=lambda v: " ".join(v)[-40:] if isinstance(v, list) else "",
    )
    def test_refuses(self, refused, words, expected):
        steps = None if any(w.startswith("budget.steps") for w in words) else "budget.steps=2"
        assert expected in refused(*words, steps=steps)

    def test_a_package_that_is_not_there_is_named(self, refused, monkeypatch):
        monkeypatch.setattr("ovi.commands.sweeping.launching._launchers", lambda: ["basic"])
        assert "pip install 'ovi[sweep]'" in refused(TWO, "launcher=joblib")

    @pytest.mark.slow
    def test_another_sweep_in_the_folder(self, sweep, refused):
        sweep("axes={model/fusion: [none]}")
        message = refused(TWO, "flow.video_weight=0.3", runs=1)
        assert "holds another sweep: flow.video_weight: 0.85, now 0.3." in message
        message = refused("axes={x: {none: {model/fusion: film}}}", runs=1)
        assert "made with other settings" in message
        assert "FiLM" in message or "film" in message

    @pytest.mark.slow
    def test_data_encoded_anew_in_its_old_place(self, sweep, refused, shards, tmp_path):
        data = tmp_path / "data"
        shutil.copytree(shards, data)
        one = ["axes={model/fusion: [none]}", f"data.path={data}"]
        sweep(*one)
        index = json.loads((data / "index.json").read_text())
        (data / "index.json").write_text(json.dumps(index | {"rejected": {"silent": 1}}))
        assert "was encoded anew since this sweep began" in refused(*one, runs=1)


@pytest.mark.slow
def test_runs_of_another_process_are_left_alone(sweep, capsys):
    folder = sweep(TWO)
    busy = folder / "film_seed0"
    (busy / "summary.json").unlink()
    code = "import sys, time\nfrom ovi.runs.alive import alive\n"
    code += "with alive(sys.argv[1]):\n    print(flush=True)\n    time.sleep(99)"
    other = subprocess.Popen([sys.executable, "-c", code, str(busy)], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        capsys.readouterr()
        sweep(TWO)
        assert "1 finished, 1 running elsewhere" in capsys.readouterr().out
        assert statuses(folder) == {"film_seed0": "running", "none_seed0": "finished"}
    finally:
        other.kill()
        other.wait()
    (busy / "metrics.jsonl").write_text("of the first try\n")
    sweep(TWO)  # its process is gone: it begins anew
    assert set(statuses(folder).values()) == {"finished"}
    assert not (busy / "metrics.jsonl").exists()


def command(shards, *words):
    """``ovi sweep`` as a process of its own."""
    base = [f"data.path={shards}", "data.batch_size=2", "data.num_workers=0", *SMALL, *QUIET]
    code = "import sys; from ovi.commands.sweep import main; main(sys.argv[1:])"
    return subprocess.Popen([sys.executable, "-c", code, *base, *words], stdout=subprocess.PIPE, text=True)


def descendants(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(one) for child in children for one in (child, *descendants(child))]


def until(found, seconds=90):
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="asks Linux for the processes")
def test_sigterm_ends_all_processes_of_a_sweep(shards, tmp_path, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    monkeypatch.chdir(tmp_path)
    there = tmp_path / "runs" / "s"
    process = command(shards, TWO, "budget.steps=1000000", "launcher=joblib", "n_jobs=2", "threads=1", "name=s")
    try:
        until(lambda: len(list(there.glob("*/.alive"))) == 2)
        children = descendants(process.pid)
        assert len(children) >= 2
        process.terminate()
        assert process.wait(60) == 143
        until(lambda: not any(Path(f"/proc/{pid}").is_dir() for pid in children), 20)
        assert statuses(there) == {"none_seed0": "stopped", "film_seed0": "stopped"}
    finally:
        for pid in (process.pid, *descendants(process.pid)) if process.poll() is None else ():
            os.kill(pid, signal.SIGKILL)


class TestBudgets:
    @pytest.mark.slow
    def test_flops_give_cheap_variants_more_steps(self, sweep):
        folder = sweep("axes={model/fusion: [none, ovi]}")
        each = {r.label: r.summary["flops_per_step"] for r in find_runs(folder)[0]}
        assert each["none"] < each["ovi"]
        budget = 40.5 * each["none"]
        made = sweep("axes={model/fusion: [none, ovi]}", f"budget.flops={budget}", steps=None, name="flops")
        steps = {r.label: r.summary["steps"] for r in find_runs(made)[0]}
        assert steps == {label: int(budget / flops) for label, flops in each.items()}
        assert steps["none"] > steps["ovi"]

    @pytest.mark.slow
    def test_seconds_are_measured_without_a_trace(self, sweep, monkeypatch):
        """A run of a budget in seconds is, step for step, a run of as many steps."""
        measure, found = calibration.seconds_per_step, []

        def spy(*args):
            found.append(measure(*args))
            return 1.0

        monkeypatch.setattr(calibration, "LEAST_S", 0.0)
        monkeypatch.setattr(calibration, "seconds_per_step", spy)
        one = "axes={model/fusion: [ovi]}"
        timed = sweep(one, "budget.seconds=3", steps=None, name="timed")
        plain = sweep(one, "budget.steps=3", steps=None, name="plain")
        assert 0 < found[0] < 5
        a, b = (torch.load(f / "ovi_seed0/checkpoints/last.ckpt", weights_only=False) for f in (timed, plain))
        assert a["global_step"] == b["global_step"] == 3
        for key, value in a["state_dict"].items():
            assert torch.equal(value, b["state_dict"][key]), key
        schedules = [c["lr_schedulers"][0] for c in (a, b)]
        assert schedules[0]["_last_lr"] == schedules[1]["_last_lr"]

    @pytest.mark.slow
    def test_a_budget_too_small_for_a_step(self, refused):
        assert "does not last for one step" in refused(TWO, "budget.flops=10", steps=None, runs=2)


@pytest.mark.slow
def test_freezing_leaves_exactly_the_rest(sweep, refused):
    folder = sweep("axes={t: {fusion: ['optim.frozen=[video,audio]'], ffn: [\"optim.frozen=['*.ffn']\"], all: []}}",
                   "callbacks.ema=null")  # fmt: skip
    states = {
        name: torch.load(folder / f"{name}_seed0/checkpoints/last.ckpt", weights_only=False)["state_dict"]
        for name in ("fusion", "ffn", "all")
    }
    same = {name: {k for k, v in state.items() if torch.equal(v, states["all"][k])} for name, state in states.items()}
    towers = {k for k in states["all"] if k.startswith(("model.video.", "model.audio."))}
    weights = {k for k in states["all"] if k.endswith("weight")}
    assert not same["fusion"] & towers & weights & {k for k in weights if "ffn" in k}
    moved = {k for k in states["fusion"] if not torch.equal(states["fusion"][k], states["ffn"][k])}
    assert not {k for k in moved if ".ffn." in k}  # frozen in both, at the same initial weights
    assert "leaves nothing to train" in refused(TWO, "optim.frozen=[video,audio,fusions]", runs=3)


@pytest.mark.slow
def test_generation_alone_is_measured_of_one_training(shards, tiny_shards, sweep):
    folder = sweep(
        "sweep=guidance",
        "axes={generation/guidance: null, g: {none: {generation/guidance: none}, cfg: {generation/guidance: cfg}}}",
        f"data.path={tiny_shards}",
        "callbacks.joint_eval.num_clips=2",
        "callbacks.joint_eval.num_real=4",
        "callbacks.joint_eval.metrics.fvd=null",
        "callbacks.joint_eval.consumers.media=null",
        "generation.num_steps=2",
        "callbacks.joint_eval.cache_dir=null",
        without=["callbacks.joint_eval"],
    )
    assert set(statuses(folder)) == {"training_seed0", "none_seed0", "cfg_seed0"}
    runs = {r.label: r for r in find_runs(folder)[0]}
    assert sorted(read_table(folder).label) == ["cfg", "none"]
    # Unguided, it is what the training itself measured at its end.
    for tag, value in runs["training"].metrics.items():
        if tag.startswith("val/") and not tag.endswith("_s"):
            assert runs["none"].metrics[tag] == pytest.approx(value, rel=1e-4, nan_ok=True), tag
    assert runs["cfg"].metrics["val/loss"] == runs["none"].metrics["val/loss"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [f.stem for f in sorted(SWEEPS.glob("*.yaml")) if f.stem != "search"])
def test_every_sweep_plans_variants_that_could_be_trained(sweep, monkeypatch, name):
    from ovi.commands.sweeping import grid

    asked = []
    monkeypatch.setattr(grid, "do_all", lambda plan, points, *a, **k: asked.extend(points) or {})
    monkeypatch.setattr(grid, "conclude", lambda *a: None)
    sweep(f"sweep={name}", "model.video.num_blocks=4", without=["callbacks.joint_eval"])
    labels = [point.variant.label for point in asked]
    assert len(labels) == len(set(labels)) > 3 or name == "guidance"
    if name == "fusion":
        assert labels == list(FUSIONS)


def test_a_process_that_dies_twice_is_given_up_and_the_others_go_on(tmp_path, monkeypatch):
    """A launcher whose process breaks tells nothing of any run in it: they are tried alone before one is given up."""
    from ovi.commands.sweeping.launching import Parallel, Runs

    done, tried = set(), []

    def launch(self, job, ids, overrides):
        tried.append(list(ids))
        for run in ids:
            if run == "b":
                raise RuntimeError("a worker was killed")
            done.add(run)
        return [{"run": run, "status": "finished"} for run in ids]

    monkeypatch.setattr(Runs, "_launch", launch)
    given_up = []
    runs = Runs(None, Parallel("joblib", 2, 1), tmp_path, [])
    answers = runs(
        None, {run: [] for run in "abc"}, lambda run: run not in done, lambda run, error: given_up.append(run)
    )
    assert tried == [["a", "b", "c"], ["b"], ["c"]]
    assert given_up == ["b"]
    assert {a["run"]: a["status"] for a in answers}["b"] == "failed"
    assert done == {"a", "c"}


def test_runs_are_launched_whatever_their_labels(tmp_path, monkeypatch):
    """Labels such as ``lr=0.1`` and ``größe`` become folders: Hydra's grammar must not stumble over them."""
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    from ovi.commands.components import load_components, store_components
    from ovi.commands.sweeping.launching import Parallel, Runs

    load_components()
    store_components()
    monkeypatch.chdir(tmp_path)
    GlobalHydra.instance().clear()
    made = variants_of({"a.lr": [1e-4, "größe"]}, lambda _: [], [], crossed=True)
    ids = [f"{variant.slug}_seed1" for variant in made]

    def job(config):
        return {"run": Path(HydraConfig.get().runtime.output_dir).name, "seed": config.seed}

    def died(run, error):
        raise error

    with initialize_config_module("ovi.conf", version_base="1.3", job_name="sweep"):
        loader = GlobalHydra.instance().config_loader()
        runs = Runs(loader, Parallel("basic", 1, None), Path("runs/it's"), [])
        answers = runs(job, {run: ["seed=1"] for run in ids}, lambda run: True, died)
    assert ids[0] == "lr=0.0001_seed1"
    assert answers == [{"run": run, "seed": 1} for run in ids]


def test_a_table_that_cannot_be_written_costs_no_run(tmp_path, monkeypatch):
    from ovi.commands.record import begin_run, write_summary
    from ovi.commands.sweeping.folder import Point, SweepFolder
    from ovi.commands.sweeping.job import Job
    from ovi.commands.sweeping.variants import Variant
    from ovi.runs.table import append_row

    def work(self, config, point, folder):
        begin_run(folder, {"label": "a", "seed": 0, "config_hash": "h"})
        write_summary(folder, {"steps": 1, "metrics": {"val/loss": 1.0}})

    monkeypatch.setattr(Job, "_work", work)
    point, folder = Point(Variant("a", ()), 0, "h"), SweepFolder(tmp_path)
    (tmp_path / "results.parquet").write_bytes(b"no table")
    answer = Job(tmp_path, "s", {"a_seed0": point}, 1)._claimed(OmegaConf.create(), "a_seed0")
    assert answer["status"] == "failed"
    assert "results.parquet: is no table" in answer["error"]
    assert folder.status(point) == "finished"
    (tmp_path / "results.parquet").unlink()
    append_row(tmp_path, {"run": "training_seed0", "config_hash": "h"})  # of the same settings, but another run
    folder.collect([point])
    assert list(read_table(tmp_path).run) == ["training_seed0", "a_seed0"]


def test_failures_beside_a_death_are_told(tmp_path):
    """A launcher whose process breaks loses the answers of the others, too."""
    from types import SimpleNamespace

    from ovi.commands.record import begin_run, write_failure
    from ovi.commands.sweeping.folder import Point, SweepFolder
    from ovi.commands.sweeping.grid import do_all
    from ovi.commands.sweeping.launching import Parallel
    from ovi.commands.sweeping.summary import Console
    from ovi.commands.sweeping.variants import Variant

    folder, point = SweepFolder(tmp_path), Point(Variant("a", ()), 0, "h")

    def runs(*args):
        begin_run(folder.of(point), {"label": "a", "seed": 0, "config_hash": "h"})
        write_failure(folder.of(point), OviError("it rained"))
        return []

    plan = SimpleNamespace(
        folder=folder, how=Parallel("joblib", 2, 1), name="s", resumes=False, runs=runs,
        composer=SimpleNamespace(overrides=lambda own, seed: []),
    )  # fmt: skip
    assert do_all(plan, [point], Console(), "runs") == {"a_seed0": "it rained"}


@pytest.mark.parametrize(
    ("budget", "max_steps", "expected"),
    [
        ({"steps": 5}, 9, False), ({"steps": 6}, 5, True), (None, 5, False), (None, 6, True), (None, -1, True),
        ({"seconds": 60}, 9, False), ({"flops": 1e9}, 5, True),
    ],
)  # fmt: skip
def test_a_run_at_its_last_step_is_not_continued(tmp_path, budget, max_steps, expected):
    """Its last checkpoint is written before its last validation: continued, it would end without figures."""
    from ovi.commands.sweeping.job import _may_go_on

    torch.save({"ovi": {}, "global_step": 5}, tmp_path / "last.ckpt")
    config = OmegaConf.create({"budget": budget, "trainer": {"max_steps": max_steps}})
    assert _may_go_on(config, tmp_path / "last.ckpt") is expected


@pytest.mark.slow
def test_a_run_interrupted_in_its_last_validation_has_figures_in_the_end(sweep, refused):
    one = "axes={model/fusion: [none]}"
    folder = sweep(one)
    (run,) = find_runs(folder)[0]
    (run.folder / "summary.json").unlink()
    sweep(one, "on_stopped=continue")
    (again,) = find_runs(folder)[0]
    assert again.metrics["val/loss"] == run.metrics["val/loss"]
    flops = 2.5 * run.summary["flops_per_step"]
    (timed,) = find_runs(sweep(one, f"budget.flops={flops}", steps=None, name="f"))[0]
    (timed.folder / "summary.json").unlink()
    message = refused(one, f"budget.flops={flops}", "on_stopped=continue", steps=None, name="f", runs=2)
    assert "has taken 2 steps, and this run asks for 2" in message


@pytest.mark.parametrize(("devices", "words"), [("auto", ["++trainer.devices=1"]), (1, []), ("1", []), ([3], [])])
def test_a_run_of_a_sweep_is_one_process(devices, words):
    from ovi.commands.sweeping.plan import _one_process

    assert _one_process(OmegaConf.create({"trainer": {"devices": devices}})) == words


def test_a_step_is_timed_whole(monkeypatch):
    """Four batches a step, a second each."""
    from types import SimpleNamespace

    trainer, now = SimpleNamespace(global_step=0, should_stop=False), [0.0]
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: now[0])
    timer = calibration._Timer(22.0)
    while not trainer.should_stop:
        now[0] += 1
        trainer.global_step = int(now[0]) // 4
        timer.on_train_batch_end(trainer, None, None, None, 0)
    assert timer.seconds_per_step == 4.0
    assert now[0] == 12 + 24  # not in the middle of a step


@pytest.mark.parametrize("measured", [0.0, 2.0])
def test_what_is_timed_is_compiled_and_nothing_timed_is_said(monkeypatch, tmp_path, measured):
    from types import SimpleNamespace

    fitted = []

    def fit(module, datamodule):
        fitted.append(module)
        trainer.callbacks[0].seconds_per_step = measured

    trainer = SimpleNamespace(world_size=1, fit=fit)

    def instantiate(node, **options):
        if "callbacks" not in options:
            return {}
        trainer.callbacks = options["callbacks"]
        return trainer

    monkeypatch.setattr(calibration, "instantiate", instantiate)
    compiled = []
    module = SimpleNamespace(model=SimpleNamespace(compile_layers=lambda: compiled.append(True)))
    config = OmegaConf.create({"budget": {"seconds": 9}, "callbacks": {}, "trainer": {}, "data": {}, "compile": True})
    if measured:
        assert calibration.seconds_per_step(config, module, tmp_path) == measured
    else:
        with pytest.raises(OviError, match="training ended before"):
            calibration.seconds_per_step(config, module, tmp_path)
    assert compiled == [True]
    assert fitted[0] is not module


def test_the_peak_of_memory_is_of_the_run_not_of_those_before_it(tmp_path):
    from ovi.commands.record import begin_run, peak_memory_gb

    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the system does not forget it")
    large = b"1" * (256 << 20)
    before = peak_memory_gb()
    del large
    begin_run(tmp_path, {})
    assert peak_memory_gb() < before - 0.2


class TestSearch:
    SPACE = "space={flow.video_weight: {low: 0.1, high: 0.9}, model/fusion: {choices: [none, film]}}"

    @pytest.fixture
    def search(self, sweep):
        pytest.importorskip("optuna")

        def call(*words, **options):
            own = ["sweeper=optuna", self.SPACE, "objective.tag=val/loss_audio"]
            return sweep(
                *(w for w in own if w.split("=")[0] not in {x.split("=")[0] for x in words}), *words, **options
            )

        return call

    @pytest.mark.slow
    def test_trials_are_told_and_interrupted_ones_done_again(self, search):
        import optuna

        from ovi.commands.sweeping.search import _storage

        folder = search("search.num_trials=2")
        study = optuna.load_study(study_name="s", storage=_storage(folder / "optuna.journal"))
        asked = study.ask({name: study.trials[0].distributions[name] for name in study.trials[0].params})
        search("search.num_trials=4")
        study = optuna.load_study(study_name="s", storage=_storage(folder / "optuna.journal"))
        assert [t.state.name for t in study.trials] == ["COMPLETE"] * 4
        assert len({t.params["flow.video_weight"] for t in study.trials}) == 4
        assert study.trials[2].params == asked.params
        table = read_table(folder).set_index("label")
        for trial in study.trials:
            row = table.loc[f"trial_{trial.number:03d}"]
            assert row["val/loss_audio"] == pytest.approx(trial.value)
            assert float(row["variant.flow.video_weight"]) == trial.params["flow.video_weight"]
            assert row["variant.model/fusion"] == trial.params["model/fusion"]

    @pytest.mark.slow
    def test_two_processes_share_the_trials(self, shards, tmp_path, monkeypatch):
        optuna = pytest.importorskip("optuna")
        from ovi.commands.sweeping.search import _storage

        monkeypatch.chdir(tmp_path)
        words = ["sweeper=optuna", self.SPACE, "objective.tag=val/loss_audio", "search.num_trials=6", "budget.steps=2"]
        both = [command(shards, *words, "name=s") for _ in range(2)]
        for process in both:
            out, _ = process.communicate(timeout=300)
            assert process.returncode == 0, out
        study = optuna.load_study(study_name="s", storage=_storage(tmp_path / "runs" / "s" / "optuna.journal"))
        assert [t.state.name for t in study.trials] == ["COMPLETE"] * len(study.trials)
        assert 6 <= len(study.trials) <= 7  # whoever asks last may not see yet that the other has asked
        table = read_table(tmp_path / "runs" / "s").set_index("label")
        assert sorted(table.index) == [f"trial_{n:03d}" for n in range(len(study.trials))]
        for trial in study.trials:
            assert table.loc[f"trial_{trial.number:03d}", "val/loss_audio"] == pytest.approx(trial.value)

    @pytest.mark.slow
    def test_failed_trials_are_tried_again_by_the_next_call(self, search, monkeypatch, capsys):
        """Once, with their settings; after that others are drawn, and no call goes on for ever."""
        import optuna

        from ovi.commands import train as train_file
        from ovi.commands.sweeping.search import _storage

        def broken(*args, **options):
            raise RuntimeError("it rained")

        def trials():
            return optuna.load_study(study_name="s", storage=_storage(Path("runs/s/optuna.journal"))).trials

        with monkeypatch.context() as rain:
            rain.setattr(train_file, "fit", broken)
            for expected in (2, 4):
                with pytest.raises(SystemExit):
                    search("search.num_trials=2")
                said = capsys.readouterr()
                assert f"2 of {expected} runs failed" in said.err
                assert "it rained" in said.err
                assert [t.state.name for t in trials()] == ["FAIL"] * expected
        assert "tried again: trial_001" in said.out
        search("search.num_trials=2")
        found = trials()
        assert [t.state.name for t in found] == ["FAIL"] * 4 + ["COMPLETE"] * 2
        assert [found[0].params, found[1].params] == [found[2].params, found[3].params]
        assert found[0].params["flow.video_weight"] not in {t.params["flow.video_weight"] for t in found[4:]}
        assert "tried again" not in capsys.readouterr().out
        search("search.num_trials=2")
        assert len(trials()) == 6

    @pytest.mark.slow
    def test_a_trial_that_goes_on_without_its_sweep_is_left_alone(self, search, capsys):
        import optuna

        from ovi.commands.sweeping.search import _storage
        from ovi.runs.alive import alive

        folder = search("search.num_trials=1")
        study = optuna.load_study(study_name="s", storage=_storage(folder / "optuna.journal"))
        study.enqueue_trial(study.trials[0].params)
        study.ask(study.trials[0].distributions)
        going = folder / "trial_001_seed0"
        shutil.copytree(folder / "trial_000_seed0", going)
        summary = (going / "summary.json").rename(folder / "kept")
        with alive(going):
            search("search.num_trials=2")
        assert "trial_001: goes on without the sweep" in capsys.readouterr().out
        assert [t.state.name for t in study.get_trials()] == ["COMPLETE", "RUNNING"]
        summary.rename(going / "summary.json")
        search("search.num_trials=2")
        assert [t.state.name for t in study.get_trials()] == ["COMPLETE"] * 2
        runs = ["trial_000_seed0", "trial_001_seed0"]
        assert sorted(read_table(folder).run) == runs  # of the same settings, both there

    @pytest.mark.slow
    def test_a_pruned_run_ends_early_and_says_so(self, search, monkeypatch):
        from ovi.commands.sweeping import search as search_file

        seen = []

        def prune(self, step, value):
            seen.append((step, value))
            return step == 2

        monkeypatch.setattr(search_file.Reporter, "__call__", prune)
        folder = search("search.num_trials=1", "budget.steps=6", "trainer.val_check_interval=2", steps=None)
        (run,) = find_runs(folder)[0]
        assert (run.summary["steps"], run.summary["pruned"]) == (2, 2)
        assert seen == [(2, pytest.approx(run.metrics["val/loss_audio"]))]
        assert list(read_table(folder).status) == ["pruned"]

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["space={}"], "nothing to search"),
            (["space={flow.video_weight: {low: 1}}"], "space.flow.video_weight"),
            (["space={flow.video_weight: {low: 1, hgih: 2}}"], "no 'hgih'. Did you mean 'high'"),
            (["space={flow.video_wieght: {low: 0.1, high: 0.2}}"], "video_wieght"),
            (["seeds=[0,1]"], "search.pruner=none"),
            (["search.num_trials=0"], "search.num_trials"),
            (["search.pruner=mediam"], "search.pruner is"),
        ],
        ids=lambda v: " ".join(v) if isinstance(v, list) else "",
    )
    def test_refuses(self, search, capsys, words, expected):
        with pytest.raises(SystemExit):
            search(*words)
        assert expected in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_launchers(sweep, launcher):
    pytest.importorskip({"joblib": "hydra_plugins.hydra_joblib_launcher"}.get(launcher, "submitit"))
    folder = sweep(TWO, f"launcher={launcher}", "n_jobs=2")
    alone = sweep(TWO, name="alone")
    rows, expected = (read_table(f).set_index("run")["val/loss"].to_dict() for f in (folder, alone))
    assert rows == pytest.approx(expected, rel=1e-5)
