"""``ovi convert``: weights to the published names."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ovi.errors import OviError

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float16", "float32")

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

EXAMPLES = """sources
  runs/first/TIME            a run of `ovi train`, or one of its .ckpt files; averaged weights where it kept them
  model.safetensors          published Ovi weights, whole, sharded (.index.json, or the folder) or .pt
  Wan2.2-TI2V-5B/            the video tower in its original names
  Wan2.2-TI2V-5B-Diffusers/transformer    the same in diffusers' names

examples
  ovi convert runs/first/TIME model.safetensors
  ovi convert model.safetensors small.safetensors --dtype bfloat16 --shard-size 5GB
  ovi convert runs/first/TIME towers.safetensors --towers video,audio
"""


def main(argv: list[str]) -> None:
    """Run ``ovi convert SOURCE TARGET [options]``."""
    arguments = parser().parse_args(argv)
    files = convert(
        arguments.source,
        arguments.target,
        towers=arguments.towers.split(",") if arguments.towers else None,
        dtype=arguments.dtype,
        shard_size=arguments.shard_size,
        overwrite=arguments.overwrite,
        allow_differences=arguments.allow_differences,
    )
    print(summary(files))


def parser() -> argparse.ArgumentParser:
    """The options of ``ovi convert``."""
    made = argparse.ArgumentParser(
        prog="ovi convert",
        description="Write weights as safetensors in the published names, for the original and tools that read it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("source", type=Path, help="a run, or weights: see below")
    made.add_argument("target", type=Path, help="a .safetensors file")
    made.add_argument("--towers", metavar="video,audio", help="keep these towers alone, without the fusion")
    made.add_argument("--dtype", choices=DTYPES, help="cast to it; otherwise the source's own")
    made.add_argument("--shard-size", metavar="5GB", help="split into files of at most that size, with an index")
    made.add_argument("--overwrite", action="store_true", help="replace what stands there")
    made.add_argument(
        "--allow-differences",
        action="store_true",
        help="write a run's weights even where the original would run them differently; the header says so",
    )
    return made


def convert(
    source: Path,
    target: Path,
    *,
    towers: list[str] | None = None,
    dtype: str | None = None,
    shard_size: str | None = None,
    overwrite: bool = False,
    allow_differences: bool = False,
) -> list[Path]:
    """Write weights in published names; returns the files.

    Raises:
        OviError: for a source that is none, a target that exists, or weights without published form.
    """
    max_shard_bytes = None if shard_size is None else num_bytes(shard_size)
    if target.suffix != ".safetensors":
        raise OviError(f"{target}: the target must end in .safetensors")
    if not target.parent.is_dir():
        raise OviError(f"{target}: the folder {target.parent} does not exist; make it first")

    import torch

    from ovi.checkpoint import find_weights, read_weights, republish, save_reference, written_under
    from ovi.checkpoint.names import MODALITIES

    there = written_under(target)
    if there and not overwrite:
        raise OviError(f"{', '.join(f.name for f in there)} in {target.parent} would be replaced: say --overwrite")
    unknown = [t for t in towers or () if t not in MODALITIES]
    if unknown:
        raise OviError(f"--towers takes {' and '.join(MODALITIES)}, divided by a comma; got {', '.join(unknown)}")
    cast: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
    file = find_weights(source)
    weights = read_weights(file)
    if weights.of_run:
        from ovi.commands.components import load_components
        from ovi.commands.restore import mapped_twin

        load_components()
        return save_reference(
            mapped_twin(file),
            target,
            parts=towers or (*MODALITIES, "fusions"),
            dtype=cast,
            max_shard_bytes=max_shard_bytes,
            allow_differences=allow_differences,
        )
    return republish(weights, target, towers=towers, dtype=cast, max_shard_bytes=max_shard_bytes)


def summary(files: list[Path]) -> str:
    """What was written: tensors, parameters, bytes, types, files."""
    from safetensors import safe_open

    from ovi.checkpoint import read_weights

    tensors = read_weights(files[-1]).tensors
    shards = [file for file in files if file.suffix == ".safetensors"]
    with safe_open(shards[0], "pt") as opened:
        noted = sorted(set(opened.metadata() or {}) - {"format"})
    types = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})
    parameters = sum(t.numel() for t in tensors.values())
    size = sum(file.stat().st_size for file in shards)
    where = f"{files[-1]} and {len(shards)} shards" if len(shards) > 1 else str(shards[0])
    said = f"{where}: {len(tensors):,} tensors, {parameters:,} parameters, {size:,} bytes, {' and '.join(types)}"
    return said + (f"\nin the header: {', '.join(noted)}" if noted else "")


def num_bytes(text: str) -> int:
    """A size in bytes: ``5GB`` is 5e9, ``5GiB`` 5 * 2^30.

    Raises:
        OviError: for what is no size, or none above 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([A-Za-z]*)", text.strip())
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found and found[2].upper() in _UNITS else 0
    if size < 1:
        raise OviError(f"--shard-size must be a size such as 5GB, 500MB or 4GiB, got {text!r}")
    return size
