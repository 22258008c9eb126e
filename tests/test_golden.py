"""The twin against inputs and outputs of the reference model."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ovi.attention import ATTENTIONS, use_attention
from ovi.checkpoint import from_reference, to_reference
from ovi.clock import Clock
from ovi.fusion import OviFusion
from ovi.patch import AudioPatch, VideoPatch
from ovi.rope import scale
from ovi.tower import Tower
from ovi.twin import TwinDiT
from plain_ovi import PlainOvi

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


def plain(metadata, tensors, dtype):
    """What an independent program computes from the golden file's weights and inputs."""
    state = {k.removeprefix("state."): t for k, t in tensors.items() if k.startswith("state.")}
    model = PlainOvi(state, json.loads(metadata["video_config"]), json.loads(metadata["audio_config"]), dtype)
    skip = int(metadata["skip_layer"])
    return model(
        tensors["in.video"], tensors["in.audio"], tensors["in.timestep"], texts(tensors, "video_text"),
        texts(tensors, "audio_text"), clean_first_frame=metadata["first_frame_is_clean"] == "True",
        skip_layer=skip or None,
    )  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_plain_program_agrees_with_the_reference(path):
    """So that it may stand for the reference's own arithmetic below."""
    metadata, tensors = load(path)
    for got, name in zip(plain(metadata, tensors, torch.float64), ("out.video", "out.audio")):
        assert (got - tensors[name]).abs().max() < 1e-5


@pytest.mark.parametrize("attention", [name for name in ATTENTIONS if name != "flash"])
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
@torch.no_grad()
def test_bfloat16_is_as_near_to_float64_as_the_reference_arithmetic(path, attention):
    metadata, tensors = load(path)
    exact, spread = plain(metadata, tensors, torch.float64), plain(metadata, tensors, torch.bfloat16)
    twin = twin_of(metadata)
    twin.load_state_dict(from_reference({k[6:]: t for k, t in tensors.items() if k.startswith("state.")}))
    use_attention(twin.to(torch.bfloat16), ATTENTIONS[attention]())
    skip = int(metadata["skip_layer"])
    ours = twin(
        tensors["in.video"].bfloat16(), tensors["in.audio"].bfloat16(), tensors["in.timestep"] / 1000,
        texts(tensors, "video_text"), texts(tensors, "audio_text"),
        clean_first_frame=metadata["first_frame_is_clean"] == "True", skip_blocks=(skip,) if skip else (),
    )  # fmt: skip
    for mine, plainly, truth in zip(ours, spread, exact):
        assert mine.dtype == torch.bfloat16
        assert (mine - truth).norm() < 1.1 * (plainly - truth).norm()


def test_all_golden_files_are_there():
    assert len(FILES) == 3


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_name_goes_both_ways(path):
    _, tensors = load(path)
    state = {k.removeprefix("state."): t for k, t in tensors.items() if k.startswith("state.")}
    back = to_reference(from_reference(state))
    assert list(back) == list(state)
    assert all(torch.equal(back[k], t) for k, t in state.items())
