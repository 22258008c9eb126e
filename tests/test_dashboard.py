"""TensorBoard's pages for comparing runs, read back from the event files by TensorBoard's own readers."""

import json
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

from ovi.runs.run import load_run
from ovi.training.callbacks.dashboard import layout, shown_settings
from ovi.training.curves import Curves


@pytest.fixture(scope="module")
def events(train, tmp_path_factory):
    """The event file of a short run of a sweep, with one validation."""
    root = tmp_path_factory.mktemp("dashboard")
    folder = root / "run"
    logger = (
        f"_target_: lightning.pytorch.loggers.TensorBoardLogger, save_dir: {folder}, name: null, version: tensorboard"
    )
    train(
        folder, f"logger.tensorboard={{{logger}}}", "trainer.max_steps=2", "trainer.val_check_interval=1",
        "trainer.limit_val_batches=1", "trainer.log_every_n_steps=1", "seed=5", "model/fusion=bridge",
        "callbacks.attention_in_time=null", "callbacks.ema=null",
    )  # fmt: skip
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0})
    found.Reload()
    return folder, found


def plugin_data(found, tag):
    content = found.SummaryMetadata(tag).plugin_data.content
    return plugin_data_pb2.HParamsPluginData.FromString(content)


def test_settings_and_final_figures_are_in_the_runs_own_event_file(events):
    folder, found = events
    experiment = plugin_data(found, "_hparams_/experiment").experiment
    assert {info.name.tag for info in experiment.metric_infos} == {
        tag for tag in found.Tags()["scalars"] if tag.startswith(("val/loss", "val/av", "val/fd"))
    }
    shown = plugin_data(found, "_hparams_/session_start_info").session_start_info.hparams
    values = {name: value.string_value or value.number_value for name, value in shown.items()}
    assert values["seed"] == 5
    assert values["model.fusion"] == "bridge"
    end = plugin_data(found, "_hparams_/session_end_info").session_end_info
    assert end.status == api_pb2.STATUS_SUCCESS
    # No run of its own beside the run's, as SummaryWriter.add_hparams would make.
    assert len(list(folder.glob("tensorboard/**/events*"))) == 1


def test_every_chart_has_a_line_in_this_run(events):
    _, found = events
    content = found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    categories = layout_pb2.Layout.FromString(content).category
    assert categories[0].title == "losses"
    tags = [tag for c in categories for chart in c.chart for tag in chart.multiline.tag]
    assert tags
    assert set(tags) <= {f"{tag}$" for tag in found.Tags()["scalars"]}


def test_charts_by_category():
    tags = [
        "val/loss", "val/fd_r_16f", "val/fd_r_16f_n", "val/av_offset_xcorr_ms", "val/clap_x", "train/samples_per_s",
        "val_real/fd_r_16f", "attention/video_hears_audio_ms", "attention/video_hears_audio_uniform_ms", "lr",
    ]  # fmt: skip
    charts = layout(tags)
    assert {title: list(of) for title, of in charts.items()} == {
        "losses": ["loss"],
        "synchronisation": ["av_offset_xcorr_ms"],
        "distances": ["fd_r_16f"],
        "other figures": ["clap_x"],
        "attention in time": ["attention/video_hears_audio_ms", "attention/video_hears_audio_uniform_ms"],
        "speed": ["train/samples_per_s"],
    }
    assert layout(sorted(tags, reverse=True)) == charts  # whatever order a run logs in: TensorBoard merges equal ones
    assert charts["losses"]["loss"] == ["Multiline", ["val/loss$"]]


def test_a_variant_stands_for_its_knobs_and_components_show_their_names(tmp_path):
    from ovi.fusion import FUSIONS

    (tmp_path / "run.json").write_text(
        json.dumps({"label": "x", "variant": {"model/fusion": "none", "data.size": "3"}})
    )
    config = {
        "model": {"fusion": FUSIONS.node("ovi"), "alignment": {"_target_": "a.b"}},
        "lr": 0.1,
        "seed": 2,
        "on": True,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    shown = shown_settings(tmp_path, ["seed", "model.fusion", "model.alignment", "lr", "on", "nothing.there"])
    assert shown == {
        "label": "x", "model/fusion": "none", "data.size": "3", "seed": 2, "model.alignment": "b",
        "lr": 0.1, "on": "True",
    }  # fmt: skip
    (tmp_path / "run.json").unlink()
    assert shown_settings(tmp_path, ["model.fusion"]) == {"model.fusion": "ovi"}


def test_a_run_continued_in_its_folder_keeps_its_curves(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    for begin in (0, 2):
        curves = Curves(str(tmp_path))
        for step in range(begin, begin + 3):
            curves.log_metrics({"loss": 10.0 * begin + step}, step)
            curves.save()
        curves.log_metrics({"val/loss": 1.0 + begin}, begin + 2)  # a new column
        curves.finalize("success")
    (tmp_path / "run.json").write_text(json.dumps({"label": "x"}))
    table = load_run(tmp_path).curves()
    of_loss = table[table.tag == "loss"]
    assert dict(zip(of_loss.step, of_loss.value)) == {0: 0.0, 1: 1.0, 2: 22.0, 3: 23.0, 4: 24.0}
    assert table[table.tag == "val/loss"].value.tolist() == [1.0, 3.0]
    assert sorted(Path(f).name for f in tmp_path.iterdir()) == ["curves", "curves_1", "run.json"]


def test_clips_are_of_the_same_noise_whatever_the_seed_of_training():
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    from ovi.commands.components import load_components, store_components

    load_components()
    store_components()
    GlobalHydra.instance().clear()
    with initialize_config_module("ovi.conf", version_base="1.3"):
        for more in ([], ["experiment=demo"]):
            config = compose("train", overrides=["data.path=x", "seed=9", *more])
            assert (config.callbacks.joint_eval.generator.seed, config.data.seed) == (0, 9)
