"""The twin against inputs and outputs of the reference model."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ovi.checkpoint import from_reference, load_reference, save_reference, to_reference
from ovi.clock import Clock
from ovi.errors import OviError
from ovi.fusion import OviFusion
from ovi.patch import AudioPatch, VideoPatch
from ovi.rope import scale
from ovi.tower import Tower
from ovi.twin import TwinDiT

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted(GOLDEN.glob("fusion_*.safetensors"))


def load(path):
    with safe_open(path, "pt") as f:
        return f.metadata(), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118


def tower(config, patch):
    sizes = {"dim": config["dim"], "num_heads": config["num_heads"], "num_blocks": config["num_layers"]}
    return Tower(
        config["in_dim"], config["text_dim"], config["text_len"],
        patch=patch, ffn_dim=config["ffn_dim"], freq_dim=config["freq_dim"], **sizes,
    )  # fmt: skip


def twin_of(metadata):
    video, audio = json.loads(metadata["video_config"]), json.loads(metadata["audio_config"])
    alignment = partial(scale, factor=audio["temporal_rope_scaling_factor"])
    return TwinDiT(
        tower(video, VideoPatch), tower(audio, AudioPatch), Clock(), fusion=OviFusion, rope_alignment=alignment
    )


def texts(tensors, name):
    names = [k for k in sorted(tensors) if k.startswith(f"in.{name}.")] or [
        k for k in sorted(tensors) if k.startswith("in.text.")
    ]
    return [tensors[k] for k in names]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_twin_agrees_with_the_reference(path):
    metadata, tensors = load(path)
    twin = twin_of(metadata)
    state = {k.removeprefix("state."): t for k, t in tensors.items() if k.startswith("state.")}
    twin.load_state_dict(from_reference(state), strict=True)
    skip = int(metadata["skip_layer"])
    with torch.no_grad():
        video, audio = twin(
            tensors["in.video"],
            tensors["in.audio"],
            tensors["in.timestep"] / 1000,
            texts(tensors, "video_text"),
            texts(tensors, "audio_text"),
            clean_first_frame=metadata["first_frame_is_clean"] == "True",
            skip_blocks=(skip,) if skip else (),
        )
    assert (video - tensors["out.video"]).abs().max() < 2e-5
    assert (audio - tensors["out.audio"]).abs().max() < 2e-5


def test_all_golden_files_are_there():
    assert len(FILES) == 3


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_name_goes_both_ways(path):
    _, tensors = load(path)
    state = {k.removeprefix("state."): t for k, t in tensors.items() if k.startswith("state.")}
    back = to_reference(from_reference(state))
    assert list(back) == list(state)
    assert all(torch.equal(back[k], t) for k, t in state.items())


def made_checkpoint(form, folder):
    """A golden file's weights on disk in one of the forms that published weights come in."""
    metadata, tensors = load(FILES[0])
    state = {k.removeprefix("state."): t.contiguous() for k, t in tensors.items() if k.startswith("state.")}
    path = folder / f"model.{'pt' if form in ('module', 'app', 'bare') else 'safetensors'}"
    if form == "whole":
        save_file(state, path)
    elif form == "sharded":
        names = [("a.safetensors", sorted(state)[::2]), ("b.safetensors", sorted(state)[1::2])]
        for name, keys in names:
            save_file({k: state[k] for k in keys}, folder / name)
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": {k: name for name, keys in names for k in keys}}))
    else:
        torch.save({"module": {"module": state}, "app": {"app": {"model": state}}, "bare": state}[form], path)
    configs = {f"{m}_config": json.loads(metadata[f"{m}_config"]) for m in ("video", "audio")}
    return path, state, configs, (metadata, tensors)


@pytest.mark.parametrize("form", ["whole", "sharded", "module", "app", "bare"])
def test_published_weights_go_in_and_out_bit_for_bit(form, tmp_path):
    path, state, configs, (metadata, tensors) = made_checkpoint(form, tmp_path)
    model = load_reference(path, **configs)
    with torch.no_grad():
        video, audio = model(
            tensors["in.video"],
            tensors["in.audio"],
            tensors["in.timestep"] / 1000,
            texts(tensors, "text"),
            texts(tensors, "text"),
            clean_first_frame=metadata["first_frame_is_clean"] == "True",
        )
    assert (video - tensors["out.video"]).abs().max() < 2e-5
    assert (audio - tensors["out.audio"]).abs().max() < 2e-5
    save_reference(model, tmp_path / "out.safetensors")
    back = load_file(tmp_path / "out.safetensors")
    assert set(back) == set(state)
    assert all(torch.equal(back[k], t) for k, t in state.items())
    assert not list(tmp_path.glob("*.partial"))


def test_weights_are_cast_on_the_way_in(tmp_path):
    path, _, configs, _ = made_checkpoint("whole", tmp_path)
    model = load_reference(path, **configs, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.is_meta for p in model.parameters())


def test_all_that_does_not_fit_is_said_at_once(tmp_path):
    _, state, configs, _ = made_checkpoint("whole", tmp_path)
    del state["video_model.blocks.1.norm3.bias"]
    state["video_model.blocks.0.ffn.2.bias"] = torch.zeros(7)
    state["audio_model.surplus"] = torch.zeros(1)
    with pytest.raises(OviError) as caught:
        load_reference(state, **configs)
    said = str(caught.value)
    assert "missing video_model.blocks.1.norm3.bias" in said
    assert "video_model.blocks.0.ffn.2.bias is [7], expected [48]" in said
    assert "unexpected audio_model.surplus" in said


def test_heads_that_cannot_be_read_off_are_asked_for(tmp_path):
    path, *_ = made_checkpoint("whole", tmp_path)
    with pytest.raises(OviError, match="num_heads in video_config"):
        load_reference(path)


def test_another_fusion_has_no_published_names(tmp_path):
    metadata, _ = load(FILES[0])
    twin = twin_of(metadata)
    twin.fusions[0].extra = torch.nn.Linear(1, 1)
    with pytest.raises(OviError, match="fusion 'ovi'"):
        save_reference(twin, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content"), [("a.safetensors", b"rubbish"), ("a.pt", b"rubbish"), ("a.index.json", b"{}")]
)
def test_damaged_checkpoints_are_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OviError, match="cannot be read"):
        load_reference(tmp_path / name)
    with pytest.raises(OviError, match="no such checkpoint"):
        load_reference(tmp_path / "nowhere.safetensors")
