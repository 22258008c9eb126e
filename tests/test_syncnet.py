"""SyncNet: names and sizes of the published network, cepstra to the last digit, and shifts that were planted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ovi.errors import OviError
from ovi.metrics.features.weights import WeightsFile
from ovi.metrics.syncnet import lip_sync as module
from ovi.metrics.syncnet.cepstra import cepstra
from ovi.metrics.syncnet.lip_sync import PUBLISHED, LipSyncError, face_pictures, lip_sync
from ovi.metrics.syncnet.network import SyncNet, load_syncnet


@pytest.fixture(scope="module")
def network() -> SyncNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SyncNet().eval().requires_grad_(False)


def test_names_and_shapes_are_the_published_ones(network):
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    convolutions = {
        "netcnnaud.0": (64, 1, 3, 3),
        "netcnnaud.4": (192, 64, 3, 3),
        "netcnnaud.8": (384, 192, 3, 3),
        "netcnnaud.11": (256, 384, 3, 3),
        "netcnnaud.14": (256, 256, 3, 3),
        "netcnnaud.18": (512, 256, 5, 4),
        "netcnnlip.0": (96, 3, 5, 7, 7),
        "netcnnlip.4": (256, 96, 1, 5, 5),
        "netcnnlip.8": (256, 256, 1, 3, 3),
        "netcnnlip.11": (256, 256, 1, 3, 3),
        "netcnnlip.14": (256, 256, 1, 3, 3),
        "netcnnlip.18": (512, 256, 1, 6, 6),
        "netfcaud.0": (512, 512),
        "netfcaud.3": (1024, 512),
        "netfclip.0": (512, 512),
        "netfclip.3": (1024, 512),
    }
    expected = {}
    for name, shape in convolutions.items():
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        tower, place = name.split(".")
        if name not in ("netfcaud.3", "netfclip.3"):
            norm = f"{tower}.{int(place) + 1}"
            expected |= {f"{norm}.{part}": shape[:1] for part in ("weight", "bias", "running_mean", "running_var")}
            expected[f"{norm}.num_batches_tracked"] = ()
    assert shapes == expected
    assert network.embed_faces(torch.rand(2, 3, 5, 224, 224)).shape == (2, 1024)
    assert network.embed_speech(torch.rand(2, 1, 13, 20)).shape == (2, 1024)


def test_weights_are_taken_whole_or_not_at_all(network, tmp_path):
    file = tmp_path / "weights.model"
    state = network.state_dict()
    torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, file)  # as old files are
    again = load_syncnet(file)
    heard = torch.rand(1, 1, 13, 20)
    assert torch.equal(again.embed_speech(heard), network.embed_speech(heard))
    again.train()
    assert not any(part.training for part in again.modules())
    torch.save({k: v for k, v in state.items() if k != "netfclip.3.bias"}, file)
    with pytest.raises(OviError, match="other weights than SyncNet's"):
        load_syncnet(file)


# --- cepstra ---------------------------------------------------------------------------------------------------------


def sweep() -> np.ndarray:
    t = np.arange(3200) / 16000
    return 0.5 * np.sin(2 * np.pi * (300 + 400 * t) * t)


def test_cepstra_have_the_digits_of_python_speech_features():
    """Rows 0, 7 and 18, columns 0, 1, 5 and 12, as version 0.6 gives them for the sweep in 16-bit integers."""
    found = cepstra(sweep())
    assert found.shape == (19, 13)
    assert found[np.ix_([0, 7, 18], [0, 1, 5, 12])] == pytest.approx(
        np.array(
            [
                [19.8403367, 24.62314957, -15.27861593, 3.95393977],
                [20.15925287, 21.52237435, -27.20505737, 13.73344927],
                [20.33077173, 20.37175541, -31.0232129, 7.69403034],
            ]
        ),
        abs=1e-7,
    )


@pytest.mark.parametrize("length", [300, 400, 500, 16000, 16081])
def test_cepstra_are_those_of_python_speech_features(length):
    speech = pytest.importorskip("python_speech_features")
    wave = np.random.default_rng(0).normal(0, 0.3, length).clip(-1, 1)
    theirs = speech.mfcc(np.round(wave * 32767).astype(np.int16), 16000)
    assert cepstra(wave) == pytest.approx(theirs, abs=1e-9)


def test_cepstra_of_silence_are_finite():
    assert np.isfinite(cepstra(np.zeros(1600))).all()


# --- distances -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [-15, -6, 0, 1, 9])
def test_the_planted_shift_and_its_distances(late):
    """Speech equals faces so many frames later, but for a known part that is at right angles."""
    generator = torch.Generator().manual_seed(abs(late))
    length, dim = 60, 32
    track = torch.randn(length + 2 * 15, dim, generator=generator)
    faces = torch.cat((track[15 : 15 + length], torch.zeros(length, 1)), 1)
    speech = torch.cat((track[15 - late : 15 - late + length], torch.full((length, 1), 0.5)), 1)
    found = lip_sync(faces, speech)
    assert found.shift_frames == late
    # By hand: pairs that exist are 0.5 apart; beyond the ends speech is zeros.
    lonely = range(length - late, length) if late > 0 else range(-late)
    lengths = [float(faces[n].norm()) for n in lonely]
    assert found.distance == pytest.approx((0.5 * (length - len(lengths)) + sum(lengths)) / length, abs=1e-4)
    means = []
    for shift in range(-15, 16):
        at = [
            torch.dist(faces[n], speech[n + shift] if 0 <= n + shift < length else torch.zeros(dim + 1)).item()
            for n in range(length)
        ]
        means.append(np.mean(at))
    assert found.distance == pytest.approx(min(means), abs=1e-4)
    assert found.confidence == pytest.approx(np.median(means) - min(means), abs=1e-4)


def test_speech_of_nothing_is_not_confident():
    generator = torch.Generator().manual_seed(5)
    faces, speech = torch.randn(2, 100, 256, generator=generator)
    same = lip_sync(faces, faces)
    assert same.confidence > 5 * lip_sync(faces, speech).confidence
    assert same.distance == pytest.approx(0, abs=1e-3)
    for a, b in ((faces, speech[:50]), (faces[0], speech[0]), (faces, speech * math.nan)):
        with pytest.raises(OviError, match="embeddings"):
            lip_sync(a, b)


# --- the measure -----------------------------------------------------------------------------------------------------


@pytest.fixture
def published(monkeypatch, tmp_path):
    file = tmp_path / "syncnet_v2.model"
    file.write_bytes(b"tiny")
    monkeypatch.setattr(WeightsFile, "find", lambda *_: file)
    return file


class Told(SyncNet):
    """Embeds a face window by its mean brightness, a window of speech by when it begins, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.faces: list[float] = []
        self.spoken: list[torch.Tensor] = []

    def embed_faces(self, windows):
        self.faces += windows.mean((1, 2, 3, 4)).tolist()
        return windows.mean((1, 2, 3, 4))[:, None]

    def embed_speech(self, windows):
        self.spoken += list(windows[:, 0])
        return windows[:, 0, 0].mean(1)[:, None]


def test_windows_are_five_frames_and_twenty_cepstra(monkeypatch, published):
    net = Told()
    monkeypatch.setattr(module, "load_syncnet", lambda _: net)
    metric = LipSyncError(25, 16000, path="x", faces_fill_frame=True)
    ramp = np.linspace(0, 250, 30).round().astype(np.uint8)
    frames = np.broadcast_to(ramp[:, None, None, None], (30, 16, 24, 3)).copy()
    wave = np.random.default_rng(0).normal(0, 0.1, 30 * 640).astype(np.float32)
    metric.update(frames, wave)
    assert len(net.faces) == len(net.spoken) == 25  # the published loop leaves the last window out
    assert net.faces == pytest.approx([float(ramp[n : n + 5].mean()) for n in range(25)], abs=1e-3)
    whole = cepstra(wave)
    for n in (0, 9, 10, 24):  # across batches
        assert net.spoken[n].numpy() == pytest.approx(whole[4 * n : 4 * n + 20].T, abs=1e-4)
    figures = {tag: value.item() for tag, value in metric.compute().items()}
    found = lip_sync(*metric.embeddings(frames, wave))
    assert figures["lse_d_syncnet"] == pytest.approx(found.distance)
    assert figures["lse_c_syncnet"] == pytest.approx(found.confidence)
    assert figures["lse_c_syncnet_n"] == figures["lse_d_syncnet_coverage"] == 1


def test_short_and_silent_clips_are_left_out(monkeypatch, published):
    monkeypatch.setattr(module, "load_syncnet", lambda _: Told())
    metric = LipSyncError(24, 48000, path="x", faces_fill_frame=True)
    frames = np.zeros((6, 16, 16, 3), np.uint8)
    metric.update(frames, np.ones(12000, np.float32))
    metric.update(np.zeros((48, 16, 16, 3), np.uint8), np.zeros(96000, np.float32))
    figures = {tag: value.item() for tag, value in metric.compute().items()}
    assert math.isnan(figures["lse_c_syncnet"])
    assert math.isnan(figures["lse_d_syncnet"])
    assert figures["lse_c_syncnet_coverage"] == figures["lse_d_syncnet_n"] == 0


def test_pictures_are_square_and_blue_comes_first():
    frames = np.zeros((2, 6, 10, 3), np.uint8)
    frames[:, :, 2:8] = (200, 100, 50)  # only the middle square is lit
    pictures = face_pictures(frames)
    assert pictures.shape == (2, 3, 224, 224)
    assert [pictures[:, n].unique().tolist() for n in range(3)] == [[50.0], [100.0], [200.0]]
    exact = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3)).astype(np.uint8)
    assert np.array_equal(face_pictures(exact)[0].numpy(), exact[0, :, :, ::-1].transpose(2, 0, 1))


def test_faces_must_be_said_to_be_faces_and_weights_be_there(monkeypatch, tmp_path, network):
    with pytest.raises(OviError, match=r"path of syncnet is not set.*syncnet_v2.model.*961e8696"):
        LipSyncError(25, 16000, faces_fill_frame=True)
    (tmp_path / "syncnet_v2.model").write_bytes(b"something else")
    with pytest.raises(OviError, match="not the published file"):
        LipSyncError(25, 16000, path=str(tmp_path), faces_fill_frame=True)
    monkeypatch.setattr(type(PUBLISHED), "find", lambda *_: tmp_path / "syncnet_v2.model")
    with pytest.raises(OviError, match="faces_fill_frame=true"):
        LipSyncError(25, 16000, path=str(tmp_path))
    monkeypatch.setattr(module, "load_syncnet", lambda _: network)
    metric = LipSyncError(25, 16000, path=str(tmp_path), faces_fill_frame=True)
    assert "network" in dict(metric.named_children())
    assert len(metric.identity()["digest"]) == 64
