"""Towers alone, from every file that holds some; and the video tower against diffusers' independent implementation."""

import json
import re
from functools import cache, partial

import pytest
import torch
from safetensors.torch import save_file

from ovi.checkpoint import load_reference, load_towers, load_twin, read_weights, to_reference
from ovi.clock import Clock
from ovi.errors import OviError
from ovi.fusion import FUSIONS
from ovi.patch import AudioPatch, LinearPatch, VideoPatch
from ovi.rope import scale
from ovi.tower import Tower
from ovi.twin import TwinDiT
from test_checkpoint import saved

# A head of 22 dimensions splits into 10, 6 and 6 for time, height and width: as unequal as 44, 42 and 42.
WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 22,
    "in_channels": 6,
    "out_channels": 6,
    "text_dim": 10,
    "freq_dim": 32,
    "ffn_dim": 56,
    "num_layers": 3,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}
TEXT_LEN = 7


@cache
def wan():
    """A small WanTransformer3DModel in which every parameter has a say."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(**WAN).eval()
    for name, parameter in model.named_parameters():
        # Norms near 1, biases and tables well away from 0, matrices that keep the size of what they multiply.
        std = 0.3 if parameter.dim() == 1 or "table" in name else parameter[0].numel() ** -0.5
        torch.nn.init.normal_(parameter, float("norm" in name and name.endswith("weight")), std)
    return model


def model_for(fusion="none", audio_patch=LinearPatch, **tower):
    torch.manual_seed(1)
    sizes = {"dim": 44, "num_heads": 2, "num_blocks": 3, "ffn_dim": 56, "freq_dim": 32, **tower}
    return TwinDiT(
        Tower(6, 10, TEXT_LEN, patch=VideoPatch, **sizes),
        Tower(5, 10, TEXT_LEN, patch=audio_patch, **sizes),
        Clock(),
        fusion=FUSIONS[fusion],
        rope_alignment=scale,
    )


def original_names(state):
    """Wan2.2's own names of what diffusers renamed, as the layers of its code are called."""
    rules = (
        (r"condition_embedder\.(text|time)_embedder\.linear_1", r"\1_embedding.0"),
        (r"condition_embedder\.(text|time)_embedder\.linear_2", r"\1_embedding.2"),
        (r"condition_embedder\.time_proj", "time_projection.1"),
        (r"attn1", "self_attn"),
        (r"attn2", "cross_attn"),
        (r"\.to_out\.0", ".o"),
        (r"\.to_([qkv])", r".\1"),
        (r"\.norm2", ".norm3"),
        (r"ffn\.net\.0\.proj", "ffn.0"),
        (r"ffn\.net\.2", "ffn.2"),
        (r"(blocks\.\d+)\.scale_shift_table", r"\1.modulation"),
        (r"^scale_shift_table", "head.modulation"),
        (r"^proj_out", "head.head"),
    )
    renamed = {}
    for name, tensor in state.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        renamed[name] = tensor
    return renamed


def wan_file(form, folder):
    """The tiny video tower as its publishers lay it down."""
    if form == "diffusers":
        wan().save_pretrained(folder)
        return folder
    if form == "diffusers in shards":
        wan().save_pretrained(folder, max_shard_size="20KB")
        return folder
    state = {k: t.contiguous() for k, t in original_names(wan().state_dict()).items()}
    assert {"blocks.2.self_attn.q.weight", "blocks.0.modulation", "head.modulation", "head.head.bias"} <= set(state)
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "WanModel", "dim": 44, "num_heads": 2, "num_layers": 3, "eps": 1e-6, "text_len": 512}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def inputs(seed=2):
    g = torch.Generator().manual_seed(seed)
    video = torch.randn(2, 6, 3, 8, 6, generator=g)
    text = [torch.randn(n, 10, generator=g) for n in (3, TEXT_LEN)]
    return video, torch.tensor([0.25, 0.907]), text


def padded(text):
    return torch.stack([torch.nn.functional.pad(t, (0, 0, 0, TEXT_LEN - len(t))) for t in text])


@torch.no_grad()
def theirs(clean_first_frame=False):
    video, sigma, text = inputs()
    timestep = 1000 * sigma
    if clean_first_frame:  # the TI2V form: a timestep per token, 0 for the first frame's 4 * 3
        timestep = timestep[:, None].repeat(1, 3 * 4 * 3)
        timestep[:, : 4 * 3] = 0
    return wan()(video, timestep, padded(text)).sample


@torch.no_grad()
def ours(model, clean_first_frame=False):
    video, sigma, text = inputs()
    velocity, nothing = model(video, None, sigma, text, None, clean_first_frame=clean_first_frame)
    assert nothing is None
    return velocity


FORMS = ("diffusers", "diffusers in shards", "original")


@pytest.mark.parametrize("clean_first_frame", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_video_tower_computes_what_diffusers_does(form, clean_first_frame, tmp_path):
    model = model_for()
    before = {k: t.clone() for k, t in model.audio.state_dict().items()}
    assert load_towers(model, wan_file(form, tmp_path)) == ("video",)
    expected = theirs(clean_first_frame)
    assert expected.std() > 0.3
    assert (ours(model, clean_first_frame) - expected).abs().max() < 2e-5
    assert all(torch.equal(before[k], t) for k, t in model.audio.state_dict().items())


def test_every_tensor_of_the_tower_counts_in_that_comparison(tmp_path):
    """Without this, a tensor loaded in the wrong place could hide behind the tolerance."""
    model = model_for()
    load_towers(model, wan_file("original", tmp_path))
    expected, unmoved = theirs(), []
    for name, parameter in model.video.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(kept.flip(0) if parameter.dim() == 1 else kept.roll(1, 0))
        if (ours(model) - expected).abs().max() < 0.02:
            unmoved.append(name)
        with torch.no_grad():
            parameter.copy_(kept)
    assert unmoved == []
    assert (ours(model) - expected).abs().max() < 2e-5


def test_diffusers_shards_are_shards(tmp_path):
    assert len(list(wan_file("diffusers in shards", tmp_path).glob("*.safetensors"))) > 2


def test_towers_keep_the_models_types(tmp_path):
    model = model_for().bfloat16()
    load_towers(model, wan_file("original", tmp_path))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    expected = wan().state_dict()["blocks.1.attn2.to_v.weight"].bfloat16()
    assert torch.equal(model.video.blocks[1].cross_attn.v.weight, expected)


@pytest.mark.parametrize("modalities", [None, ("video",), ("audio",), ("audio", "video")])
def test_published_weights_give_the_towers_asked_for_and_never_the_fusion(modalities, tmp_path):
    source, path = saved(tmp_path)
    model = load_reference(path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    wanted = ("video", "audio") if modalities is None else tuple(m for m in ("video", "audio") if m in modalities)
    assert load_towers(model, path, modalities=modalities) == wanted
    for name, tensor in model.state_dict().items():
        expected = source.state_dict()[name] if name.startswith(wanted) else torch.zeros_like(tensor)
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("fusion", list(FUSIONS))
def test_a_tower_file_in_bare_names_fits_any_fusion(fusion):
    """As an audio pretraining would leave it, in the names of one tower."""
    source, model = model_for("none", AudioPatch), model_for(fusion, AudioPatch)
    torch.nn.init.normal_(source.audio.out.head.weight)
    state = {k.removeprefix("audio_model."): t for k, t in to_reference(source.state_dict()).items() if "audio" in k}
    for n in range(3):  # either spelling of the table
        state[f"blocks.{n}.modulation"] = state.pop(f"blocks.{n}.modulation.modulation")
    assert load_towers(model, state) == ("audio",)
    for name, tensor in source.audio.state_dict().items():
        assert torch.equal(model.audio.state_dict()[name], tensor)


def test_a_tower_that_is_not_there_is_named_with_those_that_are(tmp_path):
    path = wan_file("original", tmp_path)
    with pytest.raises(OviError, match="no audio tower; there is video"):
        load_towers(model_for(), path, modalities=("audio",))
    with pytest.raises(OviError, match=r"modalities are video and audio, got \['sound'\]"):
        load_towers(model_for(), path, modalities=("sound",))


def test_nothing_is_loaded_when_something_does_not_fit():
    model = model_for()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    state = dict(wan().state_dict())
    del state["blocks.1.attn1.to_out.0.bias"]
    state["proj_out.bias"] = torch.zeros(5)
    state["condition_embedder.image_embedder.norm1.weight"] = torch.zeros(1)
    with pytest.raises(OviError) as caught:
        load_towers(model, state)
    said = str(caught.value)
    assert "3 tensors" in said
    assert "missing blocks.1.attn1.to_out.0.bias" in said
    assert "proj_out.bias is [5], expected [24]" in said
    assert "unexpected condition_embedder.image_embedder.norm1.weight" in said
    assert all(torch.equal(before[k], t) for k, t in model.state_dict().items())


def test_the_knobs_that_would_make_it_fit_are_named(tmp_path):
    with pytest.raises(OviError) as caught:
        load_towers(model_for(dim=48, num_blocks=2), wan_file("original", tmp_path))
    said = str(caught.value)
    assert said.endswith("more. Its video tower needs model.video.dim=44 model.video.num_blocks=3")


@pytest.mark.parametrize("form", FORMS)
def test_heads_written_beside_the_weights_must_be_the_models(form, tmp_path):
    """They are in no tensor's shape: with others the same weights load and mean nothing."""
    with pytest.raises(OviError, match=r"num_heads 2 against 1 in the model: set model\.video\.num_heads"):
        load_towers(model_for(num_heads=1), wan_file(form, tmp_path))


def test_heads_of_our_own_files_must_be_the_models_too(tmp_path):
    _, path = saved(tmp_path)
    other = load_reference(path, video_config={"num_heads": 1}, audio_config={"num_heads": 1, "text_len": 5})
    for load in (load_towers, load_twin):
        with pytest.raises(OviError, match="num_heads 3 against 1"):
            load(other, path)


def test_a_whole_twin_is_loaded_in_place(tmp_path):
    source, path = saved(tmp_path)
    model = load_reference(path)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.zero_()
    load_twin(model, path)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(torch.equal(t, source.state_dict()[name]) for name, t in model.state_dict().items())


def test_a_whole_twin_needs_the_fusion_of_the_checkpoint(tmp_path):
    _, path = saved(tmp_path)
    model = load_reference(path)
    model.fusions = model_for("none").fusions[:2]
    with pytest.raises(OviError, match=r"cross_attn\.k_fusion.*fusion is NoFusion; init_towers"):
        load_twin(model, path)


def test_a_model_without_storage_is_refused(tmp_path):
    _, path = saved(tmp_path)
    with pytest.raises(OviError, match="meta device"):
        load_twin(load_reference(path).to("meta"), path)


def test_one_tensor_under_two_names_is_refused():
    state = original_names(wan().state_dict())
    state["blocks.0.modulation.modulation"] = state["blocks.0.modulation"]
    with pytest.raises(OviError, match=r"blocks\.0\.modulation\.modulation is there twice"):
        load_towers(model_for(), state)


def test_reading_names_the_scheme(tmp_path):
    assert "diffusers" in read_weights(wan_file("diffusers", tmp_path)).scheme.name
    assert read_weights(partial(wan().state_dict)()).scheme.name == "diffusers' WanTransformer3DModel"
    assert "Wan2.2" in read_weights(original_names(wan().state_dict())).scheme.name
