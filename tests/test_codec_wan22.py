"""The Wan2.2 video VAE through the registry, on a tiny model of the same form."""

import json
import pickle
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ovi.clock import Clock
from ovi.codecs import VIDEO_CODECS, Codecs
from ovi.codecs.wan22 import tile_spans, tiled
from ovi.data.encode import encode
from ovi.data.index import ShardIndex
from ovi.data.media import read_clip
from ovi.data.sources import Synthetic
from ovi.errors import OviError

FORM = {
    "z_dim": 48,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
    "scale_factor_temporal": 4,
}
WEIGHTS = "vae/diffusion_pytorch_model.safetensors"


def save_vae(folder: Path, seed: int = 0, **changes):
    from diffusers import AutoencoderKLWan

    numbers = torch.Generator().manual_seed(seed)
    statistics = {
        "latents_mean": torch.randn(48, generator=numbers).tolist(),
        "latents_std": (torch.rand(48, generator=numbers) + 0.5).tolist(),
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoencoderKLWan(**{"base_dim": 8, "decoder_base_dim": 8, **FORM, **statistics, **changes})
    model.save_pretrained(folder / "vae")
    config = json.loads((folder / "vae/config.json").read_text())
    # The published config has this line, which the library has no argument for.
    (folder / "vae/config.json").write_text(json.dumps({**config, "clip_output": False}))
    return model.eval().requires_grad_(False)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder of a tiny model, and the library's own model of the same weights."""
    folder = tmp_path_factory.mktemp("wan")
    return folder, save_vae(folder)


@pytest.fixture
def copied(made, tmp_path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "copy"))


def build(folder, **knobs):
    return VIDEO_CODECS.build({"name": "wan22", "knobs": {"path": str(folder), "dtype": "float32", **knobs}})


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# --- what it computes ------------------------------------------------------------------------------------------------


def test_latents_are_normalised_posterior_means(made):
    folder, model = made
    video = pixels(2, 3, 9, 48, 64)
    config = json.loads((folder / "vae/config.json").read_text())
    mean, std = (torch.tensor(config[name], dtype=torch.float64) for name in ("latents_mean", "latents_std"))
    raw = model.encode(video).latent_dist.mean.double()
    expected = (raw - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)
    codec = build(folder)
    latent = codec.encode(video)
    torch.testing.assert_close(latent.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(codec.decode(latent), model.decode(raw.float()).sample, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_frames", [1, 5, 13])
def test_shapes_follow_the_clock(made, num_frames):
    folder, _ = made
    specs = {
        "video": {"name": "wan22", "knobs": {"path": str(folder), "dtype": "float32"}},
        "audio": {"name": "logmel", "knobs": {"stride": 256, "n_fft": 256, "mel_bins": 8}},
        "text": {"name": "hashed", "knobs": {}},
    }
    codecs = Codecs.build(specs, fps=24)
    assert codecs.clock.num_latent_frames(121) == 31 == Clock(fps=24).num_latent_frames(121)
    shape = codecs.latent_shapes(num_frames, 32, 48)["video"]
    assert shape == (48, (num_frames - 1) // 4 + 1, 2, 3)
    latent = codecs.video.encode(pixels(1, 3, num_frames, 32, 48))
    assert latent.shape[1:] == shape
    assert codecs.video.decode(latent).shape == (1, 3, num_frames, 32, 48)


def test_a_clip_of_121_frames_is_encoded_frame_by_frame_as_a_whole(made):
    """Causal in time: what came before never changes with what comes after, chunk after chunk."""
    codec = build(made[0])
    video = pixels(1, 3, 121, 32, 32)
    latent = codec.encode(video)
    assert latent.shape == (1, 48, 31, 2, 2)
    assert torch.equal(codec.encode(video[:, :, :57]), latent[:, :, :15])
    changed = video.clone()
    changed[:, :, 57:] = 0
    assert torch.equal(codec.encode(changed)[:, :, :15], latent[:, :, :15])
    assert not torch.equal(codec.encode(changed)[:, :, 15:], latent[:, :, 15:])


def test_batches_are_encoded_as_single_clips_are(made):
    video = pixels(3, 3, 5, 32, 32)
    one, three = build(made[0]), build(made[0], batch_size=3)
    alone = torch.cat([one.encode(clip[None]) for clip in video])
    assert torch.equal(one.encode(video), alone)
    torch.testing.assert_close(three.encode(video), alone, atol=2e-6, rtol=0)
    torch.testing.assert_close(three.decode(alone), one.decode(alone), atol=2e-6, rtol=0)


def test_bfloat16_differs_by_its_rounding(made):
    exact, coarse = build(made[0]), build(made[0], dtype="bfloat16")
    video = pixels(1, 3, 5, 32, 32)
    a, b = exact.encode(video), coarse.encode(video)
    assert b.dtype == torch.float32
    assert coarse.mean.dtype == torch.float32
    error = ((a - b).norm() / a.norm()).item()
    assert 1e-4 < error < 0.05


def test_making_one_draws_no_random_numbers(made):
    before = torch.get_rng_state()
    build(made[0])
    assert torch.equal(torch.get_rng_state(), before)


# --- tiles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "tile", "overlap", "unit", "spans"),
    [
        (64, 64, 16, 16, [(0, 64)]),
        (48, 64, 16, 16, [(0, 48)]),
        (112, 64, 16, 16, [(0, 64), (48, 112)]),
        (128, 64, 16, 16, [(0, 64), (32, 96), (64, 128)]),
        (80, 48, 8, 1, [(0, 48), (32, 80)]),
    ],
)
def test_tiles_cover_an_axis_evenly(size, tile, overlap, unit, spans):
    assert tile_spans(size, tile, overlap, unit) == spans


@pytest.mark.parametrize("size", range(70, 400, 7))
def test_any_axis_is_covered_with_the_overlap_asked_for(size):
    spans = tile_spans(16 * size, 512, 128, 16)
    assert spans[0][0] == 0
    assert spans[-1][1] == 16 * size
    assert all(begin % 16 == 0 and end - begin == 512 for begin, end in spans)
    assert all(before[1] - after[0] >= 128 for before, after in pairwise(spans))


@pytest.mark.parametrize("scale", [0.25, 4])
def test_tiling_a_local_map_changes_nothing(scale):
    """Of a map that looks at its own place alone, tiles and blending leave no trace."""

    def through(signal):
        if scale < 1:
            return torch.nn.functional.avg_pool2d(signal, int(1 / scale)) ** 3
        return signal.repeat_interleave(scale, -1).repeat_interleave(scale, -2) ** 3

    signal = pixels(2, 80, 112)
    unit = 4 if scale < 1 else 1
    result = tiled(through, signal, tile=32, overlap=8, unit=unit, scale=scale)
    torch.testing.assert_close(result, through(signal), atol=1e-6, rtol=1e-6)


def without_attention(codec):
    """Leaves convolutions and norms only: what remains sees a limited neighbourhood."""
    for part in (codec.model.encoder, codec.model.decoder):
        for attention in part.mid_block.attentions:
            attention.proj.weight.zero_()
            attention.proj.bias.zero_()
    return codec


def test_tiles_agree_with_whole_frames_away_from_their_edges(made):
    """Exactly, once attention, which spans a whole tile, is out of the way."""
    video = pixels(1, 3, 5, 32, 768)
    whole = without_attention(build(made[0]))
    cut = without_attention(build(made[0], encode_tile=448, overlap=128))
    a, b = whole.encode(video), cut.encode(video)
    assert tile_spans(768, 448, 128, 16) == [(0, 448), (320, 768)]
    difference = (a - b).abs().amax(dim=(0, 1, 2, 3))  # by column; the cut is at 24, tiles meet in 20..28
    assert difference[:8].max() < 1e-5
    assert difference[-8:].max() < 1e-5
    assert difference[18:30].max() > 1e-4
    # The result there is still a blend of two encodings: small against the latents themselves.
    assert (a - b).square().mean().sqrt() < 0.1 * a.square().mean().sqrt()


def test_decoded_tiles_come_close_to_whole_frames(made):
    latent = pixels(1, 48, 2, 6, 40, seed=3)
    whole = build(made[0], decode_tile=None).decode(latent)
    cut = build(made[0], decode_tile=256, overlap=128).decode(latent)
    assert whole.shape == cut.shape == (1, 3, 5, 96, 640)
    assert not torch.equal(whole, cut)
    assert (whole - cut).square().mean().sqrt() < 0.1 * whole.square().mean().sqrt()
    assert torch.equal(build(made[0], decode_tile=640).decode(latent), whole)


@pytest.mark.parametrize("knobs", [{"encode_tile": 100}, {"decode_tile": 128}, {"overlap": 20}, {"batch_size": 0}])
def test_tiles_that_do_not_fit_are_refused(made, knobs):
    with pytest.raises(OviError, match=next(iter(knobs))):
        build(made[0], **knobs)


# --- statistics and identity -----------------------------------------------------------------------------------------


def test_statistics_are_the_checkpoints_and_stay(made):
    codec = build(made[0])
    assert codec.fitted
    mean, std = codec.mean.clone(), codec.std.clone()
    codec.fit([pixels(1, 3, 1, 16, 16)])
    assert torch.equal(codec.mean, mean)
    assert torch.equal(codec.std, std)


def test_a_shard_set_keeps_codec_statistics_and_digest(made, tmp_path):
    specs = {
        "video": {"name": "wan22", "knobs": {"path": str(made[0]), "dtype": "float32"}},
        "audio": {"name": "logmel", "knobs": {"mel_bins": 16, "phase_steps": 2}},
        "text": {"name": "hashed", "knobs": {}},
    }
    codecs = Codecs.build(specs, fps=8)
    source = Synthetic(path=str(tmp_path / "clips"), num_clips=2, seed=5)
    encode(source, codecs, tmp_path / "out", num_frames=9, height=32, width=32, val_fraction=0, dtype="float32")
    index = ShardIndex.load(tmp_path / "out")
    again = index.codecs()
    assert again.audio.fitted  # the codec beside it is still fitted
    assert index.content["codecs"]["state"]["video"]["weights_sha256"] == codecs.video.weights_sha256
    assert torch.equal(again.video.mean, torch.tensor(made[1].config.latents_mean))
    clip = read_clip(
        next((tmp_path / "clips").glob("*.mp4")), fps=8, num_frames=9, height=32, width=32, sample_rate=16000
    )
    frames = torch.from_numpy(clip.frames)
    video, _ = again.encode_clip(frames, torch.from_numpy(clip.waveform))
    raw = made[1].encode(frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1).latent_dist.mean[0]
    mean, std = (torch.tensor(made[1].config[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    torch.testing.assert_close(video, (raw - mean) / std, atol=1e-5, rtol=0)


def test_other_weights_are_refused(made, tmp_path):
    codec = build(made[0])
    state = json.loads(json.dumps(codec.state()))
    build(made[0]).load_state(state)
    save_vae(tmp_path, seed=1)
    with pytest.raises(OviError, match="encoded with weights of sha256") as error:
        build(tmp_path).load_state(state)
    assert state["weights_sha256"][:16] in str(error.value)
    with pytest.raises(OviError, match="sha256 None"):
        codec.load_state({k: v for k, v in state.items() if k != "weights_sha256"})


def test_the_digest_of_one_file_is_that_of_sha256sum(made):
    import hashlib

    assert build(made[0]).state()["weights_sha256"] == hashlib.sha256((made[0] / WEIGHTS).read_bytes()).hexdigest()


def test_it_can_be_pickled(made):
    codec = build(made[0])
    video = pixels(1, 3, 5, 32, 32)
    assert torch.equal(pickle.loads(pickle.dumps(codec)).encode(video), codec.encode(video))


def test_weights_in_parts_load_too(made, copied):
    tensors = load_file(copied / WEIGHTS)
    names = sorted(tensors)
    where = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for part in set(where.values()):
        save_file({n: tensors[n] for n in names if where[n] == part}, copied / "vae" / part)
    (copied / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": where}))
    (copied / WEIGHTS).unlink()
    video = pixels(1, 3, 5, 32, 32)
    codec = build(copied)
    assert torch.equal(codec.encode(video), build(made[0]).encode(video))
    assert len(codec.weight_files) == 2
    (copied / "vae/part-1.safetensors").unlink()
    with pytest.raises(OviError, match=r"lacks part-1\.safetensors"):
        build(copied)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 4, 32, 32), r"4 frames do not fit: need 4n \+ 1"),
        ((1, 3, 5, 40, 32), "40x32 pixels do not divide by 16"),
        ((1, 1, 5, 32, 32), r"expected pixels \[B, 3, T, H, W\]"),
        ((3, 5, 32, 32), r"expected pixels"),
    ],
)
def test_signals_that_do_not_fit_are_refused(made, shape, message):
    with pytest.raises(OviError, match=message):
        build(made[0]).encode(torch.zeros(shape))


def test_latents_of_another_width_are_refused(made):
    with pytest.raises(OviError, match=r"expected latents \[B, 48, F, h, w\]"):
        build(made[0]).decode_raw(torch.zeros(1, 16, 1, 2, 2))


def test_a_still_picture_and_nan_pass_as_what_they_are(made):
    codec = build(made[0])
    still = pixels(1, 3, 1, 32, 32).expand(-1, -1, 9, -1, -1)
    assert codec.encode(still).isfinite().all()
    broken = still.clone()
    broken[..., 0, 0] = torch.nan
    assert codec.encode(broken).isnan().any()  # never hidden: the encoder of clips rejects such a sample


def test_a_missing_folder_names_knob_repository_and_files(tmp_path):
    with pytest.raises(OviError, match=r"path=.*nowhere is no folder") as error:
        build(tmp_path / "nowhere")
    assert "Wan-AI/Wan2.2-TI2V-5B-Diffusers" in str(error.value)
    assert "vae/diffusion_pytorch_model.safetensors" in str(error.value)


def test_wrong_folders_are_refused(made, copied, tmp_path):
    with pytest.raises(OviError, match=r"lacks config\.json, diffusion_pytorch_model\.safetensors"):
        build(copied, subfolder="text_encoder")
    with pytest.raises(OviError, match="dtype must be one of"):
        build(copied, dtype="int8")
    (copied / WEIGHTS).write_bytes((copied / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(OviError, match="cannot be read"):
        build(copied)
    (copied / WEIGHTS).unlink()
    with pytest.raises(OviError, match=r"lacks diffusion_pytorch_model\.safetensors"):
        build(copied)
    (tmp_path / "Wan2.2_VAE.pth").touch()
    with pytest.raises(OviError, match=r"original Wan2\.2_VAE\.pth"):
        build(tmp_path)


def test_weights_that_are_not_whole_are_refused(copied):
    tensors = load_file(copied / WEIGHTS)
    gone = tensors.pop("decoder.conv_out.bias")
    save_file(tensors, copied / WEIGHTS)
    with pytest.raises(OviError, match=r"1 lacking, such as decoder\.conv_out\.bias"):
        build(copied)
    save_file({**tensors, "decoder.conv_out.bias": gone[:1].clone()}, copied / WEIGHTS)
    with pytest.raises(OviError, match="1 of another shape"):
        build(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_residual": False}, "is not the Wan2.2 VAE"),
        ({"patch_size": None}, "is not the Wan2.2 VAE"),
        ({"latents_mean": [0.0]}, "48 values as latents_mean"),
        ({"scale_factor_spatial": 8}, "its layers make 16"),
        ({"_class_name": "AutoencoderKL"}, "is a AutoencoderKL,"),
    ],
)
def test_other_vaes_are_refused(copied, change, message):
    config = json.loads((copied / "vae/config.json").read_text())
    (copied / "vae/config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(OviError, match=message):
        build(copied)


# --- hub names -------------------------------------------------------------------------------------------------------


def test_a_hub_name_is_fetched_by_the_library_and_said_so(made, monkeypatch, caplog, tmp_path):
    import huggingface_hub

    asked = []

    def fetch(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        return str(made[0])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    build("someone/some-model")
    assert asked == [("someone/some-model", ["vae/*"])]
    assert "taking it for a hub repository" in caplog.text
    build(made[0])
    assert len(asked) == 1  # a folder asks nobody


def test_a_hub_that_does_not_answer_is_told(monkeypatch, tmp_path):
    import huggingface_hub

    def fail(repo, allow_patterns):
        raise ConnectionError("no route")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(OviError, match=r"could not be fetched \(ConnectionError: no route\)"):
        build("someone/some-model")
