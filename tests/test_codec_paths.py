"""Sets and checkpoints whose codecs' weights lie elsewhere on this machine, and knobs that sets may differ in."""

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from latent_sets import SPECS, copy_set, write_set
from ovi.codecs import VIDEO_CODECS, Codecs
from ovi.codecs.base import VideoCodec
from ovi.codecs.bundle import REGISTRIES, with_paths
from ovi.codecs.dct import BlockDCT
from ovi.codecs.published import PublishedLatents, weights_folder
from ovi.commands.components import load_components, store_components
from ovi.commands.restore import make_record, restore
from ovi.data.index import ShardIndex
from ovi.errors import OviError
from ovi.training.callbacks.joint_eval import JointEvalCallback
from ovi.training.datamodule import ShardsDataModule


class Kept(PublishedLatents, BlockDCT):
    """A codec with weights in a folder: one number that scales pixels."""

    incidental_knobs = frozenset({"path", "batch_size"})

    def __init__(self, *, path: str, batch_size: int = 1, block: int = 8) -> None:
        folder = weights_folder("kept", path, repo="some/where", patterns=["*"], expected="weights.json")
        BlockDCT.__init__(self, block=block)
        self.weight_files = (folder / "weights.json",)
        self.scale = json.loads(self.weight_files[0].read_text())
        self.fitted = True

    def encode_raw(self, signal):
        return super().encode_raw(signal) * self.scale


def weights(folder: Path, scale: float) -> Path:
    folder.mkdir()
    (folder / "weights.json").write_text(json.dumps(scale))
    return folder


@pytest.fixture(scope="module", autouse=True)
def kept():
    with VIDEO_CODECS.temporary("kept", Kept):
        yield


@pytest.fixture
def moved(tmp_path):
    """A set encoded with weights that have since gone to another folder, and that folder."""
    there = weights(tmp_path / "there", 3.0)
    specs = {**SPECS, "video": {"name": "kept", "knobs": {"path": str(there)}}}
    stored = json.loads(json.dumps(Codecs.build(specs, fps=8).to_dict()))
    plain = write_set(tmp_path / "plain", {"train": [5, 5], "val": [3]})
    folder = copy_set(plain, tmp_path / "set", lambda content: content.update(codecs=stored))
    here = there.rename(tmp_path / "here")
    content = json.loads((folder / "index.json").read_text())
    content["text"] = {"dim": 64, "len": 48}  # as every set since version 2 says it
    (folder / "index.json").write_text(json.dumps(content))
    return ShardIndex.load(folder), here


def test_weights_are_found_where_codec_paths_says(moved):
    index, here = moved
    with pytest.raises(OviError, match=r"path=.*there is no folder.*set codec_paths\.video=FOLDER"):
        index.codecs()
    frames = torch.rand(1, 3, 2, 16, 16) * 2 - 1
    found = index.codecs({"video": str(here), "audio": None})
    torch.testing.assert_close(found.video.encode_raw(frames), BlockDCT().encode_raw(frames) * 3.0)
    assert found.to_dict()["video"]["knobs"]["path"] == str(here)
    assert found.to_dict()["state"] == index.content["codecs"]["state"]


def test_other_weights_are_refused_by_their_digest_and_the_knob_is_named(moved, tmp_path):
    other = weights(tmp_path / "other", 2.0)
    with pytest.raises(OviError, match=r"weights of sha256.*set codec_paths\.video=FOLDER"):
        moved[0].codecs({"video": str(other)})


@pytest.mark.parametrize(
    ("paths", "says"),
    [
        ({"audio": "/a"}, r"codec_paths\.audio=/a: 'logmel' has no weights to look for"),
        ({"picture": "/a"}, "codec_paths has no 'picture', it has video, audio, text"),
    ],
)
def test_paths_that_no_codec_takes_are_refused(moved, paths, says):
    with pytest.raises(OviError, match=says):
        moved[0].codecs(paths)


def test_a_record_says_where_the_weights_were_in_training(moved):
    index, here = moved
    data = ShardsDataModule(path=str(index.folder))
    record = make_record(OmegaConf.create(), data.layout, index.content, 0.1, {"video": str(here)})
    assert Codecs.from_dict(record["codecs"]).video.scale == 3.0
    assert index.content["codecs"]["video"]["knobs"]["path"] != str(here)  # the set's own is not touched


def test_a_checkpoint_is_restored_where_its_codecs_weights_moved(moved, tmp_path):
    index, here = moved
    data = ShardsDataModule(path=str(index.folder))
    model = OmegaConf.create({"_target_": "torch.nn.Identity", "_partial_": True})
    record = make_record(model, data.layout, index.content, 0.1)
    torch.save({"ovi": record, "state_dict": {}, "global_step": 7}, tmp_path / "last.ckpt")
    with pytest.raises(OviError, match=r"set codec_paths\.video=FOLDER"):
        restore(tmp_path / "last.ckpt")
    assert restore(tmp_path / "last.ckpt", {"video": str(here)}).codecs.video.scale == 3.0


@pytest.mark.parametrize("name", ["train", "sample", "evaluate"])
def test_commands_take_the_paths(name):
    load_components()
    store_components()
    given = {"train": ["data.path=x"], "sample": ["checkpoint=x", "prompts=y"], "evaluate": []}[name]
    with initialize_config_module("ovi.conf", version_base="1.3"):
        config = compose(name, overrides=[*given, "codec_paths.text=/umt5"])
    for node in ["codec_paths", *(["data.codec_paths"] if name == "train" else [])]:
        assert OmegaConf.select(config, node) == {"video": None, "audio": None, "text": "/umt5"}


class Mean(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, _):
        return (self.weight - batch.video.mean()) ** 2

    def validation_step(self, batch, _):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, data, *callbacks):
    trainer = L.Trainer(
        default_root_dir=folder, accelerator="cpu", max_steps=2, val_check_interval=1, num_sanity_val_steps=0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(Mean(), datamodule=data)
    return trainer.global_step


def test_training_that_decodes_nothing_needs_no_weights(moved, tmp_path):
    assert fit(tmp_path, ShardsDataModule(path=str(moved[0].folder), batch_size=2)) == 2


def test_validation_that_decodes_finds_out_before_the_first_step(moved, tmp_path):
    data = ShardsDataModule(path=str(moved[0].folder), batch_size=2)
    steps = []
    watch = L.pytorch.callbacks.LambdaCallback(on_train_batch_start=lambda *_: steps.append(1))
    callback = JointEvalCallback(generator=None, num_clips=1)
    with pytest.raises(OviError, match=r"codec_paths\.video=FOLDER.*callbacks\.joint_eval=null"):
        fit(tmp_path, data, callback, watch)
    assert not steps


def test_decoding_builds_no_text_encoder(moved):
    index, here = moved
    data = ShardsDataModule(path=str(index.folder), codec_paths={"video": str(here)})
    assert data.codecs.decode(torch.zeros(1, 12, 8, 2, 2), torch.zeros(1, 31, 64))[0].shape == (1, 8, 16, 16, 3)
    with pytest.raises(OviError, match="without their text encoder"):
        data.codecs.text.encode(["a dog"])


def test_sets_may_differ_in_where_weights_lie_and_what_computing_costs_alone(moved, tmp_path):
    index, here = moved

    def but(name, **knobs):
        change = lambda content: content["codecs"]["video"]["knobs"].update(knobs)  # noqa: E731
        return index.differences(ShardIndex.load(copy_set(index, tmp_path / name, change)))

    assert but("cheaper", path=str(here), batch_size=4) == []
    assert but("coarser", block=16) == ["video.knobs.block 8 against 16"]


@pytest.mark.parametrize("kind", REGISTRIES)
def test_incidental_knobs_are_knobs_and_weights_places_are_among_them(kind):
    for name, component in REGISTRIES[kind].items():
        knobs = set(REGISTRIES[kind].knobs(name))
        assert component.incidental_knobs <= knobs, name
        assert {"path", "batch_size"} & knobs <= component.incidental_knobs, name


def test_null_paths_change_nothing(moved):
    stored = moved[0].content["codecs"]
    assert with_paths(stored, {"video": None, "audio": None, "text": None}) == stored
    assert issubclass(Kept, VideoCodec)
