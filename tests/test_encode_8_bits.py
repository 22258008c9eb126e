"""8-bit latents: what is stored, and the error that the index says it has."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ovi.data.encode import encode
from ovi.data.sources import Folder
from test_encode import SIZE, codecs, samples, write_folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[dict, dict, Path]:
    made = tmp_path_factory.mktemp("8 bits")
    source = Folder(path=str(write_folder(made / "in", 5)))
    for dtype in ("float32", "int8"):
        encode(source, codecs(), made / dtype, **SIZE, val_fraction=0.0, dtype=dtype)
    return samples(made / "float32"), samples(made / "int8"), made


def test_latents_are_whole_steps_of_their_channel_and_text_is_float16(sets):
    exact, stored, _ = sets
    assert set(exact) == set(stored)
    for key, (tensors, _) in stored.items():
        assert {name: tensor.dtype for name, tensor in tensors.items()} == {
            "video": torch.int8, "video.scale": torch.float32, "audio": torch.int8, "audio.scale": torch.float32,
            "text": torch.float16,
        }  # fmt: skip
        video, audio = (exact[key][0][name].numpy() for name in ("video", "audio"))
        scale = tensors["video.scale"].numpy()
        np.testing.assert_allclose(scale, np.abs(video).max((1, 2, 3)) / 127, rtol=1e-5)
        read = tensors["video"].numpy() * scale[:, None, None, None]
        assert (np.abs(read - video) <= 0.5001 * scale[:, None, None, None]).all()
        read = tensors["audio"].numpy() * tensors["audio.scale"].numpy()
        assert (np.abs(read - audio) <= 0.5001 * tensors["audio.scale"].numpy()).all()


def test_the_index_says_the_error(sets):
    exact, stored, made = sets
    index = json.loads((made / "int8" / "index.json").read_text())
    assert index["dtype"] == "int8"
    said = index["quantisation"]
    for name, axis in (("video", 0), ("audio", -1)):
        squares = errors = 0.0
        for key, (tensors, _) in stored.items():
            numbers = exact[key][0][name].numpy().astype(np.float64)
            scale = np.moveaxis(tensors[name + ".scale"].numpy()[:, None], 0, axis)
            shape = [-1 if a == axis % numbers.ndim else 1 for a in range(numbers.ndim)]
            read = tensors[name].numpy() * scale.reshape(shape).astype(np.float64)
            squares, errors = squares + (numbers**2).sum(), errors + ((numbers - read) ** 2).sum()
        assert said[f"{name}_rel_rms"] == pytest.approx(np.sqrt(errors / squares), rel=1e-4)
        assert 0 < said[f"{name}_rel_rms"] < 0.02
    assert "quantisation" not in json.loads((made / "float32" / "index.json").read_text())


def test_half_the_bytes_of_float16(sets, tmp_path):
    _, stored, made = sets
    encode(Folder(path=str(made / "in")), codecs(), tmp_path, **SIZE, val_fraction=0.0)
    halves = samples(tmp_path)
    for name in ("video", "audio"):
        of = [sum(tensors[name].numel() * tensors[name].element_size() for tensors, _ in s.values())
              for s in (stored, halves)]  # fmt: skip
        assert of[0] * 2 == of[1]
