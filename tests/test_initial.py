"""What training starts from: published weights whole, or towers under a new fusion, through the real ``fit``."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import PUBLISHED_FORM
from ovi.checkpoint import to_reference
from ovi.commands.convert import convert
from ovi.commands.restore import restore
from ovi.errors import OviError

STILL = ["optim.optimizer.lr=0", "callbacks.ema=null", "optim.optimizer.weight_decay=0"]
"""Training that changes nothing: what the run ends with is what it started from."""


def started(folder):
    return restore(folder).model.state_dict()


@pytest.fixture(scope="module")
def published(published_run, tmp_path_factory):
    """The run's weights in published names: whole, as the authors' .pt, and in shards."""
    folder = tmp_path_factory.mktemp("weights")
    convert(published_run, folder / "model.safetensors")
    (folder / "shards").mkdir()
    convert(published_run, folder / "shards" / "model.safetensors", shard_size="1MB")
    torch.save({"module": load_file(folder / "model.safetensors")}, folder / "model.pt")
    return folder


@pytest.mark.parametrize("source", ["run", "model.safetensors", "shards", "model.pt"])
def test_training_starts_from_all_weights_of(source, published, published_run, train, tmp_path):
    path = published_run if source == "run" else published / source
    train(tmp_path / "run", *PUBLISHED_FORM, *STILL, f"init_from={path}")
    expected, got = started(published_run), started(tmp_path / "run")
    assert set(got) == set(expected)
    assert all(torch.equal(got[k], t) for k, t in expected.items())


@pytest.mark.parametrize("source", ["run", "model.safetensors"])
def test_a_fusion_is_learnt_anew_on_given_towers(source, published, published_run, train, tmp_path):
    path = published_run if source == "run" else published / source
    train(tmp_path / "fresh", *PUBLISHED_FORM, *STILL, "seed=9")
    train(tmp_path / "run", *PUBLISHED_FORM, *STILL, "seed=9", f"init_towers={path}")
    given, fresh, got = started(published_run), started(tmp_path / "fresh"), started(tmp_path / "run")
    assert any(not torch.equal(given[k], fresh[k]) for k in given if k.startswith("fusions"))
    for name, tensor in got.items():
        assert torch.equal(tensor, (fresh if name.startswith("fusions") else given)[name]), name


def test_one_file_for_each_tower(published, published_run, train, tmp_path):
    state = {k: t for k, t in load_file(published / "model.safetensors").items()}
    bare = {
        k.removeprefix("video_model."): t + 1
        for k, t in state.items()
        if k.startswith("video_model.") and "fusion" not in k
    }
    save_file(bare, tmp_path / "wan.safetensors")
    towers = f"init_towers={{video: {tmp_path}/wan.safetensors, audio: {published_run}}}"
    train(tmp_path / "run", *PUBLISHED_FORM, *STILL, towers, "model/fusion=none")
    got = to_reference(started(tmp_path / "run"))
    for name, tensor in got.items():
        assert torch.equal(tensor, state[name] + name.startswith("video_model.")), name
    train(tmp_path / "one", *PUBLISHED_FORM, *STILL, "seed=1", f"init_towers={{video: {tmp_path}/wan.safetensors}}")
    got = to_reference(started(tmp_path / "one"))
    assert torch.equal(got["video_model.head.head.bias"], state["video_model.head.head.bias"] + 1)
    assert not torch.equal(got["audio_model.text_embedding.0.weight"], state["audio_model.text_embedding.0.weight"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["init_from={file}", "init_towers={file}"], "give one of them"),
        (["init_from={file}", "model/fusion=none"], "k_fusion.*fusion is NoFusion; init_towers"),
        (["init_from={run}", "model/fusion=none"], "unexpected fusions.*init_towers"),
        (["init_from={file}", "model.video.dim=36"], r"time_embedding.0.weight is \[24, 256\], expected \[36, 256\]"),
        (["init_towers={file}", "model.video.num_heads=1"], "num_heads 2 against 1"),
        (["init_towers={{audio: {video}}}"], "no audio tower; there is video"),
        (["init_towers={{sound: {video}}}"], "modalities are video and audio"),
        (["init_towers={nowhere}"], "no such checkpoint"),
        (["init_from=[1]"], "init_from must be a path"),
        (["init_from={slow}"], "init_from=.* fps 8 against 10|fps 10 against 8"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_made(words, says, published, published_run, train, tmp_path):
    from safetensors import safe_open

    state = load_file(published / "model.safetensors")
    video, slow = tmp_path / "video.safetensors", tmp_path / "slow.safetensors"
    save_file({k: t for k, t in state.items() if k.startswith("video_") and "fusion" not in k}, video)
    with safe_open(published / "model.safetensors", "pt") as opened:
        metadata = opened.metadata()
    save_file(state, slow, metadata | {"clock": metadata["clock"].replace('"fps": 8', '"fps": 10')})
    named = {"file": published / "model.safetensors", "run": published_run, "nowhere": tmp_path / "nowhere"}
    with pytest.raises(OviError, match=says):
        train(tmp_path / "run", *PUBLISHED_FORM, *(w.format(**named, video=video, slow=slow) for w in words))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model/rope_alignment=seconds"], "other positions"),
        (["model.rope_alignment.factor=0.25"], "audio token j lies at 0.25.*factor=0.19676"),
        (["model.video.mask_text_padding=true"], "hides the padding"),
    ],
)
@pytest.mark.parametrize("knob", ["init_from", "init_towers"])
def test_another_clock_than_the_weights_learnt_is_allowed_and_said(knob, words, says, published, train, tmp_path):
    with pytest.warns(UserWarning, match=says):
        train(tmp_path / "run", *PUBLISHED_FORM, *words, f"{knob}={published / 'model.safetensors'}")
