"""Sets of latent shards written with tarfile alone, so that what reads them is tested against something else."""

import hashlib
import json
import tarfile
from io import BytesIO
from pathlib import Path

import torch
from safetensors.torch import save

from ovi.codecs import Codecs
from ovi.data.index import FORMAT, VERSION, ShardIndex

VIDEO, AUDIO = (12, 8, 2, 2), (31, 64)
SPECS = {"video": {"name": "dct"}, "audio": {"name": "logmel"}, "text": {"name": "hashed"}}


def sample(number, video=VIDEO, audio=AUDIO, dtype=torch.float16):
    """Tensors filled with the sample's number, and its json: what comes out can be told from its key."""
    tensors = {"text": torch.full((1 + number % 3, 64), float(number), dtype=dtype)}
    if video is not None:
        tensors["video"] = torch.full(video, float(number), dtype=dtype)
    if audio is not None:
        tensors["audio"] = torch.full(audio, -float(number), dtype=dtype)
    return tensors, {"caption": f"clip {number}", "file": f"{number}.mp4", "truth": {"count": number}}


def write_tar(path, members):
    """(name, bytes) pairs to a tar."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, BytesIO(content))


def members(key, tensors, about):
    return [(f"{key}.json", json.dumps(about).encode()), (f"{key}.safetensors", save(tensors))]


def write_set(folder, sizes, *, shapes=None, prefix="clip", dtype=torch.float16, version=VERSION, first=0, damaged=()):
    """A set; samples are numbered from ``first`` through train, then val.

    Args:
        folder: to write to.
        sizes: samples of each shard of each split.
        shapes: for each shard in order, ``{"video": ..., "audio": ...}``; None where it has the set's.
        damaged: numbers of samples whose video has a NaN.
    """
    folder = Path(folder)
    folder.mkdir(exist_ok=True, parents=True)
    splits, number = {}, first
    coming = iter(shapes or [])
    for split, counts in sizes.items():
        shards = []
        for place, count in enumerate(counts):
            path = folder / f"{split}-{place:06d}.tar"
            shape = next(coming, None)
            content = []
            for _ in range(count):
                made = sample(number, **(shape or {}), dtype=dtype)
                if number in damaged:
                    made[0]["video"].view(-1)[0] = float("nan")
                content += members(f"{prefix}-{number:04d}", *made)
                number += 1
            write_tar(path, content)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            about = {"file": path.name, "num_samples": count, "num_bytes": path.stat().st_size, "sha256": digest}
            shards.append(about | ({"latent_shapes": shape} if shape else {}))
        splits[split] = {"num_samples": sum(counts), "shards": shards}
    codecs = Codecs.build(SPECS, fps=8)
    content = {
        "format": FORMAT,
        "version": version,
        "clock": codecs.clock.to_dict(),
        "codecs": codecs.to_dict(),
        "num_frames": 8,
        "height": 16,
        "width": 16,
        "latent_shapes": codecs.latent_shapes(8, 16, 16),
        "dtype": str(dtype).removeprefix("torch."),
        "splits": splits,
    }
    (folder / "index.json").write_text(json.dumps(content))
    return ShardIndex.load(folder)


def copy_set(index, folder, change=lambda content: None):
    """A copy of the index's folder with its index changed."""
    folder.mkdir()
    for file in Path(index.folder).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    content = json.loads((folder / "index.json").read_text())
    change(content)
    (folder / "index.json").write_text(json.dumps(content))
    return folder
