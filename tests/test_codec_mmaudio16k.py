"""MMAudio's 16 kHz VAE and vocoder against outputs of the reference, and by their own form."""

import json
import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ovi.codecs import AUDIO_CODECS, Codecs
from ovi.codecs.mmaudio16k import save_diffusers
from ovi.errors import OviError

GOLDEN = Path(__file__).parent / "golden"
RATE = 16000


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def golden(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """State, and inputs with outputs, of a golden file."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    state = {k.removeprefix("state."): t for k, t in tensors.items() if k.startswith("state.")}
    return state, {k: t for k, t in tensors.items() if not k.startswith("state.")}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """The golden weights as the files that MMAudio publishes, computed entries included."""
    folder = tmp_path_factory.mktemp("mmaudio")
    vae, vocoder = golden("audio_vae")[0], golden("vocoder")[0]
    torch.save({**vae, "mel_converter.mel_basis": torch.zeros(80, 513)}, folder / "v1-16.pth")
    torch.save({"generator": vocoder}, folder / "best_netG.pt")
    return folder


@pytest.fixture(scope="module")
def diffusers_folder(original, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("diffusers")
    save_diffusers(build(original), folder)
    return folder


@pytest.fixture(params=["original", "diffusers_folder"])
def codec(request):
    return build(request.getfixturevalue(request.param))


def build(folder, **knobs):
    return AUDIO_CODECS.build({"name": "mmaudio16k", "knobs": {"path": str(folder), **knobs}})


def sine(hz: float, num_samples: int) -> torch.Tensor:
    return (0.5 * torch.sin(2 * math.pi * hz * torch.arange(num_samples) / RATE))[None]


# --- against the reference -------------------------------------------------------------------------------------------


def test_vae_agrees_with_the_reference(codec):
    tensors = golden("audio_vae")[1]
    latent = codec.encode(tensors["in.waveform"])
    assert latent.dtype == torch.float32
    torch.testing.assert_close(latent.mT, tensors["out.latent_mean"], atol=5e-6, rtol=0)
    torch.testing.assert_close(codec.mel(tensors["in.waveform"]), tensors["out.mel"], atol=5e-6, rtol=0)
    decoded = codec.decode_mel(tensors["out.latent_mean"].mT)
    torch.testing.assert_close(decoded, tensors["out.mel_decoded"], atol=5e-6, rtol=0)


def test_vocoder_agrees_with_the_reference(codec):
    tensors = golden("vocoder")[1]
    waveform = codec.vocoder(tensors["in.mel"]).sample
    # Its random weights amplify rounding; a clamp in place of the tangent, or no bias, is 0.25 off.
    torch.testing.assert_close(waveform, tensors["out.waveform"], atol=2e-4, rtol=0)


def test_decoding_is_the_vocoder_on_the_decoded_mel(codec):
    latent = golden("audio_vae")[1]["out.latent_mean"].mT
    expected = codec.vocoder(codec.decode_mel(latent)).sample[:, 0]
    assert torch.equal(codec.decode(latent), expected)


def test_mel_is_that_of_numpy(original):
    """Slaney's filters, by their own description, on magnitudes by numpy in float64."""
    num = 4096
    sound = np.random.default_rng(0).uniform(-0.8, 0.8, num)
    padded = np.pad(sound, 384, mode="reflect")
    frames = np.stack([padded[256 * i : 256 * i + 1024] for i in range(num // 256)])
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    magnitude = np.sqrt(np.abs(np.fft.rfft(frames * window)) ** 2 + 1e-9)
    edge = 15 + 27 * np.log(8000 / 1000) / np.log(6.4)  # 8 kHz in mel: 3 per 200 Hz up to 1 kHz, then logarithmic
    mels = np.linspace(0, edge, 82)
    hz = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * np.log(6.4) / 27))
    at = np.linspace(0, 8000, 513)
    bank = np.stack([np.interp(at, hz[i : i + 3], [0, 1, 0]) * 2 / (hz[i + 2] - hz[i]) for i in range(80)])
    expected = np.log10(np.maximum(magnitude @ bank.T, 1e-5)).T
    mel = build(original).mel(torch.from_numpy(sound).float()[None])[0].numpy()
    np.testing.assert_allclose(mel, expected, atol=2e-4)


# --- lengths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_samples", "num_tokens"), [(80_640, 157), (80_667, 157), (512, 1), (1535, 2)])
def test_tokens_are_those_of_the_clock(original, num_samples, num_tokens):
    codec = build(original)
    specs = {"video": {"name": "dct"}, "audio": {"name": "mmaudio16k", "knobs": {"path": str(original)}}}
    clock = Codecs.build({**specs, "text": {"name": "hashed"}}, fps=24).clock
    assert clock.num_audio_tokens(num_samples) == num_tokens
    assert codec.encode(sine(440, num_samples)).shape == (1, num_tokens, codec.latent_channels)


def test_the_ten_second_clip_needs_its_padding_for_314_tokens(original):
    codec = build(original)
    assert codec.encode(sine(440, 160_667)).shape[1] == 313  # 241 frames at 24 fps
    assert codec.encode(torch.nn.functional.pad(sine(440, 160_667), (0, 101))).shape[1] == 314


def test_a_token_is_512_samples_of_waveform(original):
    codec = build(original)
    assert codec.decode(torch.zeros(1, 3, codec.latent_channels)).shape == (1, 1536)


def test_an_onset_lies_at_its_own_token(original):
    """Sound from sample 8192 on changes the tokens from 16 on, and those before it the less the further they are."""
    codec = build(original)
    without = torch.zeros(1, 16384)
    sound = without.clone()
    sound[:, 8192:] = sine(1000, 8192)
    # Attention reaches everywhere; without it the convolutions' reach fades from the onset on.
    codec.vae.vae.encoder.mid.attn_1.proj_out.weight.data.zero_()
    change = (codec.encode(sound) - codec.encode(without)).abs().amax(dim=(0, 2))
    assert change[17:].min() > 0.01
    assert change[:6].max() < 0.01 * change[17:].min()


def test_codecs_decode_to_the_clips_own_length(original):
    specs = {
        "video": {"name": "dct", "knobs": {"temporal_stride": 4}},
        "audio": {"name": "mmaudio16k", "knobs": {"path": str(original)}},
        "text": {"name": "hashed"},
    }
    codecs = Codecs.build(specs, fps=24)
    shapes = codecs.latent_shapes(9, 16, 16)
    assert shapes["audio"] == (11, codecs.audio.latent_channels)
    frames, sound = codecs.decode(torch.zeros(1, *shapes["video"]), torch.zeros(1, *shapes["audio"]))
    assert frames.shape == (1, 9, 16, 16, 3)
    assert sound.shape == (1, 6000)  # 9 / 24 s


# --- batches, types, identity ----------------------------------------------------------------------------------------


def test_batches_are_encoded_as_single_clips_are(original):
    one, many = build(original, batch_size=1), build(original)
    sounds = torch.cat([sine(300, 4096), sine(700, 4096), torch.zeros(1, 4096)])
    torch.testing.assert_close(many.encode(sounds), one.encode(sounds), atol=3e-6, rtol=0)


@pytest.mark.parametrize(("dtype", "lowest", "highest"), [("bfloat16", 2e-3, 5e-2), ("float16", 2e-4, 1e-2)])
def test_shorter_types_differ_by_their_rounding(original, dtype, lowest, highest):
    exact, coarse = build(original), build(original, dtype=dtype)
    sound = golden("audio_vae")[1]["in.waveform"]
    a, b = exact.encode(sound), coarse.encode(sound)
    assert b.dtype == torch.float32
    assert lowest < ((a - b).norm() / a.norm()).item() < highest
    assert coarse.decode(a[:, :2]).dtype == torch.float32
    assert torch.equal(exact.mel(sound), coarse.mel(sound))
    with pytest.raises(OviError, match="dtype=float32"):
        save_diffusers(coarse, "unused")


def test_nothing_is_fitted_or_scaled(original):
    codec = build(original)
    assert codec.fitted
    codec.fit([sine(440, 1024)])
    sound = sine(440, 1024)
    assert torch.equal(codec.encode(sound), codec.encode_raw(sound))


def test_other_weights_are_refused(original, tmp_path):
    state = json.loads(json.dumps(build(original).state()))
    build(original).load_state(state)
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    vae = torch.load(tmp_path / "v1-16.pth")
    vae["data_mean"] = vae["data_mean"] + 1e-3
    torch.save(vae, tmp_path / "v1-16.pth")
    with pytest.raises(OviError, match="encoded with weights of sha256"):
        build(tmp_path).load_state(state)


def test_it_can_be_pickled(original):
    codec = build(original)
    sound = sine(440, 2048)
    assert torch.equal(pickle.loads(pickle.dumps(codec)).encode(sound), codec.encode(sound))


def test_making_one_draws_no_random_numbers(original):
    before = torch.get_rng_state()
    build(original)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_folder_of_the_hub_repository_is_found(original, tmp_path):
    shutil.copytree(original, tmp_path / "ext_weights")
    assert build(tmp_path).weights_sha256 == build(original).weights_sha256


# --- bad input -------------------------------------------------------------------------------------------------------


def test_signals_that_do_not_fit_are_refused(original):
    codec = build(original)
    with pytest.raises(OviError, match="511 samples are less than one token of 512"):
        codec.encode(torch.zeros(1, 511))
    with pytest.raises(OviError, match="expected mono waveforms"):
        codec.encode(torch.zeros(1, 2, 4096))
    with pytest.raises(OviError, match=r"expected latents \[B, L, 8\]"):
        codec.decode_raw(torch.zeros(1, 2, 20))


def test_silence_and_too_loud_sound_encode_and_nan_shows(original):
    codec = build(original)
    assert codec.encode(torch.zeros(1, 2048)).isfinite().all()
    loud = 4 * sine(440, 2048)
    assert torch.equal(codec.encode(loud), codec.encode(loud.clamp(-1, 1)))
    broken = sine(440, 2048)
    broken[0, 1000] = torch.nan
    assert codec.encode(broken).isnan().any()


def test_missing_files_are_named(original, tmp_path):
    with pytest.raises(OviError, match=r"path=.*nowhere is no folder") as error:
        build(tmp_path / "nowhere")
    assert "v1-16.pth and best_netG.pt" in str(error.value)
    assert "hkchengrex/MMAudio" in str(error.value)
    with pytest.raises(OviError, match=r"lacks v1-16\.pth and best_netG\.pt"):
        build(tmp_path)
    shutil.copy(original / "v1-16.pth", tmp_path)
    with pytest.raises(OviError, match=r"lacks best_netG\.pt, and"):
        build(tmp_path)


def test_wrong_files_are_refused(original, tmp_path):
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    shutil.copy(original / "v1-16.pth", tmp_path / "best_netG.pt")
    with pytest.raises(OviError, match="has no 'generator'"):
        build(tmp_path)
    shutil.copy(original / "best_netG.pt", tmp_path / "best_netG.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "v1-16.pth")
    with pytest.raises(OviError, match="there is no tensor"):
        build(tmp_path)
    (tmp_path / "v1-16.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(OviError, match="cannot be read"):
        build(tmp_path)


@pytest.mark.parametrize("file", ["v1-16.pth", "best_netG.pt"])
def test_weights_that_are_not_whole_are_refused(original, tmp_path, file):
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    content = torch.load(tmp_path / file)
    state = content.get("generator", content)
    gone = "conv_post.bias" if "generator" in content else "decoder.mid.attn_1.qkv.weight"
    del state[gone]
    torch.save(content, tmp_path / file)
    with pytest.raises(OviError, match=f"1 lacking, such as {gone}"):
        build(tmp_path)


def test_the_44_khz_model_is_refused(diffusers_folder, tmp_path):
    shutil.copytree(diffusers_folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "vae/config.json").read_text())
    (tmp_path / "vae/config.json").write_text(json.dumps({**config, "sample_rate": 44100}))
    with pytest.raises(OviError, match="sample_rate=44100, expected 16000"):
        build(tmp_path)


def test_the_librarys_own_vocoder_is_refused(diffusers_folder, tmp_path):
    """It has no bias in its last convolution and would be 0.25 off with only a warning."""
    shutil.copytree(diffusers_folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "vocoder/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["conv_post.bias"]
    save_file(tensors, file)
    with pytest.raises(OviError, match=r"1 lacking, such as conv_post\.bias"):
        build(tmp_path)
