"""Run folders read back: whole, being written, damaged, old; their table; what makes two the same."""

import json
import math
import multiprocessing as mp
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
import yaml

from ovi.errors import OviError
from ovi.runs.alive import alive, is_alive
from ovi.runs.identity import config_hash
from ovi.runs.run import find_runs, load_run
from ovi.runs.table import append_row, metric_tags, read_table, row_of, table_of
from run_folders import OFFSET, run_folder, sweep_folder

HOLDER = """
import sys, time
from ovi.runs.alive import alive
with alive(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def planted(folder, **changed):
    options = {"label": "fusion=ovi", "seed": 3, "metrics": {OFFSET: 12.5, "val/loss": 0.5}, **changed}
    return run_folder(folder, **options)


def test_what_a_run_wrote_is_read_back(tmp_path):
    run = load_run(planted(tmp_path / "ovi_seed3", variant={"model/fusion": "ovi"}, attention_ms=40))
    assert (run.status, run.label, run.seed, run.variant) == ("finished", "fusion=ovi", 3, {"model/fusion": "ovi"})
    assert run.metrics == {OFFSET: 12.5, "val/loss": 0.5}
    curves = run.curves()
    assert list(curves.columns) == ["step", "tag", "value"]
    last = curves[curves.tag == "val/loss"].iloc[-1]
    assert last.step == 198
    assert last.value == pytest.approx(0.5 * (1 + math.exp(-198 / 50)), rel=1e-4)
    assert not curves.value.isna().any()
    clips = run.clips()
    assert list(clips.columns) == ["step", "number", "caption", "tag", "value"]
    assert (clips.value == 12.5).all()
    assert len(clips) == 3
    assert {name: file.name for name, file in run.attention().items()} == {
        "audio_sees_video": "step_000200_audio_sees_video.png",
        "video_hears_audio": "step_000200_video_hears_audio.png",
    }


def test_samples_are_of_the_last_step_that_has_any(tmp_path):
    folder = planted(tmp_path / "a")
    for name in ("samples/step_000100/000.mp4", "samples/step_001000/001.mp4", "samples/real/000.mp4"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    (folder / "samples/step_002000").mkdir()  # a round that has only just begun
    run = load_run(folder)
    assert {n: file.parent.name for n, file in run.samples().items()} == {1: "step_001000"}
    assert list(run.real_samples()) == [0]


def test_a_run_that_is_being_written_is_running_and_readable(tmp_path):
    folder = planted(tmp_path / "a", status="stopped")
    (folder / "clips.jsonl").write_text('{"step": 1, "number": 0, "figures": {"x": 2.0}}\n{"step": 1, "num')
    (folder / "metrics.jsonl").write_text('{"step": 1, "generated": {"x": null}}\n{"st')
    (folder / "curves" / "metrics.csv").write_text("epoch,step,train/loss\n0,9,0.5\n0,19")
    assert load_run(folder).status == "stopped"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        run = load_run(folder)
        with pytest.raises(OviError, match="another run writes there"), alive(folder):
            pass
        holder.kill()  # however it ends
    assert (run.status, run.metrics, run.summary) == ("running", {}, {})
    assert run.clips().value.tolist() == [2.0]
    assert run.rounds() == [{"step": 1, "generated": {"x": None}}]
    assert run.curves().value.tolist() == [0.5]
    assert load_run(folder).status == "stopped"


def test_a_process_that_looks_at_its_own_run_keeps_its_lock(tmp_path):
    look = f"from ovi.runs.alive import is_alive; print(is_alive({str(tmp_path)!r}))"
    with alive(tmp_path):
        assert is_alive(tmp_path)
        assert is_alive(os.path.relpath(tmp_path))
        # Another process still sees it held: looking has not given the lock up.
        assert subprocess.check_output([sys.executable, "-c", look], text=True) == "True\n"
        with pytest.raises(OviError, match="another run writes there"), alive(tmp_path):
            pass
    assert not is_alive(tmp_path)
    assert not is_alive(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_statuses(tmp_path):
    for status in ("finished", "failed", "stopped"):
        run = load_run(planted(tmp_path / status, status=status))
        assert run.status == status
    assert load_run(tmp_path / "failed").failure["error"] == "RuntimeError: loss is NaN"


def test_a_run_that_ends_while_it_is_read_is_finished_or_running(tmp_path, monkeypatch):
    folder = planted(tmp_path / "a", status="stopped")

    def ends(folder):
        (folder / "summary.json").write_text('{"steps": 1, "metrics": {}}')
        return False

    monkeypatch.setattr("ovi.runs.run.is_alive", ends)
    assert load_run(folder).status == "finished"


def test_settings_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    from omegaconf import OmegaConf

    from ovi.commands.record import write_versions

    def full(*args):
        raise OSError(28, "no space left")

    monkeypatch.setattr("ovi.data.files.os.replace", full)
    with pytest.raises(OviError, match=r"config.yaml: no space left"):
        write_versions(tmp_path, OmegaConf.create({"a": 1}))
    assert list(tmp_path.iterdir()) == []


def test_a_run_from_before_run_json_is_called_after_its_folder(tmp_path):
    config = {"model": {}, "data": {}, "trainer": {}, "seed": 7}
    for name in ("study/2026-01-02_10-00-00", "bridge_seed7"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "summary.json").write_text(json.dumps({"metrics": {"val/a": None, "val/b": 1}}))
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 5, "generated": {"b": 2, "a": None}, "real": {}}))
    runs, problems = find_runs(tmp_path)
    assert problems == []
    assert [(run.label, run.seed, run.name) for run in runs] == [
        ("bridge", 7, "bridge_seed7"), ("study", 7, "study/2026-01-02_10-00-00"),
    ]  # fmt: skip
    assert {run.config_hash for run in runs} == {config_hash(config)}
    assert math.isnan(runs[0].metrics["val/a"])
    assert runs[0].clips().empty
    # Without curves, the validation rounds stand for them.
    assert runs[0].curves().to_dict("records") == [{"step": 5, "tag": "val/b", "value": 2.0}]


def test_a_continued_run_keeps_the_curves_from_before(tmp_path):
    folder = planted(tmp_path / "a")
    curves = folder / "curves"
    (curves / "metrics.csv").write_text("step,loss\n20,0.2\n30,0.1\n")
    before = curves.with_name("curves_1")
    before.mkdir()
    (before / "metrics.csv").write_text("step,loss\n10,0.5\n20,0.4\n")
    table = load_run(folder).curves()
    assert table.value.tolist() == [0.5, 0.2, 0.1]  # step 20 was taken twice: the second time counts


def test_what_is_damaged_is_named_and_the_others_are_read(tmp_path):
    for name in ("good", "bad_summary", "bad_config", "bad_identity"):
        planted(tmp_path / name)
    (tmp_path / "bad_summary" / "summary.json").write_text('{"metrics": {')
    (tmp_path / "bad_config" / "config.yaml").write_text("a: [1, 2")
    (tmp_path / "bad_identity" / "run.json").write_text("[]")
    runs, problems = find_runs(tmp_path)
    assert [run.folder.name for run in runs] == ["good"]
    assert [p for p in problems if "cannot be read" in p or "holds no names" in p] == problems
    for name in ("bad_summary/summary.json", "bad_config/config.yaml", "bad_identity/run.json"):
        assert sum(str(tmp_path / name) in p for p in problems) == 1
    with pytest.raises(OviError, match="no run of `ovi train` lies there"):
        load_run(tmp_path)
    with pytest.raises(OviError, match="there is no such folder"):
        find_runs(tmp_path / "nowhere")
    (tmp_path / "good" / "clips.jsonl").write_text('{"step": 1, "numb\n{"step": 1, "number": 2, "figures": {"x": 1}}\n')
    with pytest.warns(UserWarning, match="line 1 is damaged"):
        assert load_run(tmp_path / "good").clips().number.tolist() == [2]


def test_patterns_and_runs_named_twice(tmp_path):
    sweep_folder(tmp_path / "s", {"ovi": 10.0, "none": 90.0}, clips=False, attention_ms=None)
    runs, _ = find_runs(str(tmp_path / "s" / "*ovi_seed*"), tmp_path / "s" / "fusion=ovi_seed0")
    assert [run.seed for run in runs] == [0, 1, 2]


def test_a_hundred_runs_load_fast(tmp_path):
    first = planted(tmp_path / "000")
    for n in range(1, 100):
        shutil.copytree(first, tmp_path / f"{n:03d}")
    began = time.perf_counter()
    runs, _ = find_runs(tmp_path)
    table = table_of(runs)
    assert time.perf_counter() - began < 3
    assert len(table) == 100


# --- what makes two runs the same ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settings():
    """A composed training config, resolved, as plain data."""
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    from ovi.commands.components import load_components, store_components

    load_components()
    store_components()
    GlobalHydra.instance().clear()
    with initialize_config_module("ovi.conf", version_base="1.3"):
        config = compose(
            "train", overrides=["data.path=x", "callbacks.checkpoint.dirpath=c", "optim.optimizer.lr=1e-5"]
        )
    for logger in config.logger.values():
        logger.save_dir = "somewhere"
    return OmegaConf.to_container(config, resolve=True)


def changed(settings, path, value):
    copy = json.loads(json.dumps(settings))
    *above, last = path.split(".")
    node = copy
    for key in above:
        node = node[key]
    assert node.get(last) != value
    node[last] = value
    return copy


def test_a_hash_is_of_what_decides_the_result(settings):
    same = {
        "name": "other", "label": "x", "data.num_workers": 3, "data.cache_dir": "/somewhere",
        "callbacks.progress": None, "logger": {}, "trainer.accelerator": "cpu", "trainer.log_every_n_steps": 1,
        "trainer.devices": 1, "resume": "a",
        "callbacks.checkpoint.every_n_train_steps": 7, "callbacks.joint_eval.consumers.media.num_shown": 1,
        "callbacks.joint_eval.cache_dir": "c",
    }  # fmt: skip
    others = {
        "seed": 1, "trainer.max_steps": 101, "model.fusion._target_": "x", "data.path": "y", "data.batch_size": 4,
        "optim.optimizer.lr": 2e-5, "callbacks.joint_eval.generator.num_steps": 3, "callbacks.joint_eval.num_clips": 3,
        "callbacks.joint_eval.generator.seed": 2, "trainer.precision": "bf16-mixed", "trainer.devices": 2,
        "callbacks.ema": None, "flow.video_weight": 0.5, "init_from": "weights",
    }  # fmt: skip
    whole = config_hash(settings)
    for path, value in same.items():
        assert config_hash(changed(settings, path, value)) == whole, path
    assert config_hash(changed(settings, "trainer.devices", [1])) == whole  # one device, whichever it is
    assert len({whole, *(config_hash(changed(settings, *other)) for other in others.items())}) == len(others) + 1


def test_the_hash_survives_yaml(settings):
    assert config_hash(yaml.safe_load(yaml.safe_dump(settings))) == config_hash(settings)
    assert config_hash(settings | {"sigma": 1.0, "of": (1, 2)}) == config_hash(settings | {"sigma": 1, "of": [1, 2]})


# --- tables ----------------------------------------------------------------------------------------------------------


def test_rows_say_what_runs_say_and_nothing_else(tmp_path):
    run = load_run(planted(tmp_path / "a", variant={"model/fusion": "ovi"}))
    row = row_of(run)
    assert list(row)[:6] == ["run", "label", "variant.model/fusion", "seed", "status", "config_hash"]
    assert (row["steps"], row["flops"], row[OFFSET]) == (200, 4e11, 12.5)
    bare = row_of(load_run(planted(tmp_path / "b", status="stopped", metrics={})))
    assert set(bare) == {"run", "label", "seed", "status", "config_hash"}
    table = table_of([load_run(tmp_path / "a"), load_run(tmp_path / "b")])
    assert math.isnan(table.loc[1, OFFSET])  # missing, not 0
    assert metric_tags(table) == [OFFSET, "val/loss"]


def test_a_row_of_the_same_settings_is_replaced_and_new_figures_get_a_column(tmp_path):
    row = {"run": "a", "label": "x", "seed": 0, "status": "finished", "config_hash": "0123", "val/loss": 2.0}
    append_row(tmp_path, row)
    append_row(tmp_path, row | {"val/loss": 1.0, "variant.lr": 0.1, "parameters": 5})
    append_row(tmp_path, row | {"config_hash": "456", "run": "b", "val/fd": math.nan})
    for name in ("results.parquet", "results.csv", ""):
        table = read_table(tmp_path / name)
        assert table["config_hash"].tolist() == ["0123", "456"]  # words, though they look like numbers
        assert table["val/loss"].tolist() == [1.0, 2.0]
        assert table["variant.lr"].tolist()[0] == "0.1"
        assert table["variant.lr"].isna().tolist() == [False, True]
        assert table["val/fd"].isna().all()
    assert sorted(f.name for f in tmp_path.iterdir()) == [".results.lock", "results.csv", "results.parquet"]


def test_words_that_look_like_nothing_stay_words(tmp_path):
    append_row(tmp_path, {"run": "a", "label": "None", "variant.k": "null", "val/x": math.nan, "val/y": 0.5})
    append_row(tmp_path, {"run": "NA", "label": "nan", "val/x": 1.0})
    for name in ("results.parquet", "results.csv"):
        table = read_table(tmp_path / name)
        assert (table.run.tolist(), table.label.tolist()) == (["a", "NA"], ["None", "nan"])
        assert (table["variant.k"].tolist()[0], table["variant.k"].isna().tolist()) == ("null", [False, True])
        assert (table["val/x"].isna().tolist(), table["val/y"].tolist()[0]) == ([True, False], 0.5)


def _append(job):
    folder, number = job
    append_row(
        folder, {"run": f"r{number}", "label": "x", "seed": number, "config_hash": f"h{number}", "val/a": number}
    )


@pytest.mark.parametrize("how", ["processes", "threads"])
def test_rows_added_at_once_are_all_there(tmp_path, how):
    jobs = [(tmp_path, n) for n in range(12)]
    if how == "threads":
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(_append, jobs))
    else:
        with mp.get_context("fork").Pool(3) as pool:
            pool.map(_append, jobs, chunksize=1)
    table = read_table(tmp_path)
    assert sorted(table["val/a"]) == list(range(12))
    pd.testing.assert_frame_equal(table, read_table(tmp_path / "results.csv"), check_dtype=False)


def test_a_damaged_table_is_named_and_not_written_over(tmp_path):
    (tmp_path / "results.parquet").write_bytes(b"no parquet")
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(OviError, match=r"results.parquet: is no table.*made again"):
        append_row(tmp_path, {"run": "a"})
    assert (tmp_path / "results.parquet").read_bytes() == b"no parquet"
    with pytest.raises(OviError, match="no runs there"):
        read_table(empty)


def test_a_folder_without_a_table_is_read_run_by_run(tmp_path):
    sweep_folder(tmp_path, {"ovi": 10.0, "none": 90.0}, clips=False, attention_ms=None)
    table = read_table(tmp_path)
    assert table.groupby("label")[OFFSET].mean().to_dict() == {"fusion=ovi": 10.0, "fusion=none": 90.0}
