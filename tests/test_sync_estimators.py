"""SyncNet as an estimator of offsets: planted delays of sound, other rates, what crosses to another process."""

import math
import pickle

import numpy as np
import pytest

from ovi.errors import OviError
from ovi.metrics.features.weights import WeightsFile
from ovi.metrics.sync_estimators import SYNC_ESTIMATORS, SyncNetOffset
from ovi.metrics.syncnet import lip_sync as module
from ovi.metrics.syncnet.cepstra import cepstra
from ovi.metrics.syncnet.network import SyncNet

LOUD = 0.3
UNIT = float(cepstra(LOUD * np.random.default_rng(9).standard_normal(16000).clip(-3, 3))[:, 0].mean())
"""First cepstrum, the log of the energy, of noise at full amplitude."""


class Levels(SyncNet):
    """Embeds a face window by its brightness, and speech by its loudness, on one scale."""

    def embed_faces(self, windows):
        return windows.mean((1, 2, 3, 4))[:, None] / 255 * 8 - 4

    def embed_speech(self, windows):
        return windows[:, 0, 0].mean(1)[:, None] - UNIT + 4


@pytest.fixture
def estimator(monkeypatch, tmp_path):
    file = tmp_path / "syncnet_v2.model"
    file.write_bytes(b"tiny")
    monkeypatch.setattr(WeightsFile, "find", lambda *_: file)
    monkeypatch.setattr(module, "load_syncnet", lambda _: Levels())
    return SYNC_ESTIMATORS["syncnet"](path=str(file), faces_fill_frame=True)


def clip(late, *, fps=25, sample_rate=16000, num_frames=75):
    """Pictures that brighten and sound that swells together, but the sound so many frames of 40 ms later."""
    rng = np.random.default_rng(3)
    track = rng.uniform(0, 1, num_frames + 40)
    shown = track[20 : 20 + num_frames].repeat(fps // 25)
    frames = np.broadcast_to((shown * 255).round().astype(np.uint8)[:, None, None, None], (len(shown), 8, 8, 3))
    heard = track[20 - late : 20 - late + num_frames].repeat(sample_rate // 25)
    # Energy goes with twice the logarithm of the amplitude: 8 units of it over the whole range.
    noise = rng.standard_normal(num_frames * 640).clip(-3, 3)
    noise = noise.repeat(sample_rate // 16000)
    return frames.copy(), (LOUD * np.exp(4 * heard - 4) * noise).astype(np.float32), fps, sample_rate


@pytest.mark.parametrize("late", [-7, -2, 0, 3, 10])
def test_sound_that_is_late_has_a_positive_offset(estimator, late):
    offset_ms, confidence = estimator(*clip(late))
    assert offset_ms == 40 * late
    assert confidence > 0.4


def test_other_rates_are_brought_to_the_networks(estimator):
    assert estimator(*clip(4, fps=50, sample_rate=48000))[0] == 160


def test_clips_that_say_nothing_have_no_offset(estimator):
    frames, sound, fps, rate = clip(0)
    for given in ((frames, np.zeros_like(sound)), (frames[:6], sound[: 6 * 640])):
        offset_ms, confidence = estimator(*given, fps, rate)
        assert math.isnan(offset_ms)
        assert confidence == 0


def test_only_its_knobs_cross_to_another_process(estimator):
    sent = pickle.dumps(estimator)
    assert len(sent) < 1000
    again = pickle.loads(sent)
    assert (again.path, again.faces_fill_frame) == (estimator.path, True)
    assert again(*clip(5)) == estimator(*clip(5))


def test_missing_weights_and_pictures_that_are_no_faces_are_named(monkeypatch, tmp_path):
    with pytest.raises(OviError, match=r"path of syncnet is not set.*syncnet_v2\.model"):
        SyncNetOffset(faces_fill_frame=True)
    monkeypatch.setattr(WeightsFile, "find", lambda *_: tmp_path)
    with pytest.raises(OviError, match="faces_fill_frame=true"):
        SyncNetOffset(path="x")
