"""Memory that the published video VAE takes at 720p: its network with weights drawn by chance, in processes of its own.

Each case loads the codec ``wan22`` from a folder of weights, as users do, and encodes or decodes one clip of 704x1280
pixels; the figure is the process's largest resident set, imports, weights, pixels and latents included. It is measured
on the host: an accelerator's kernels take other scratch memory. The network walks a clip four frames at a time, so the
second such step shows what any number takes, pixels aside. ``--out FILE`` keeps the result; ``--smoke`` is small.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from machine import machine
from ovi.codecs.wan22 import Wan22
from ovi.commands.record import git_state
from ovi.data.files import write_json
from setting import PRESETS

HEIGHT, WIDTH = 704, 1280
FORM = {"z_dim": 48, "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}
FORM |= {"scale_factor_spatial": 16, "scale_factor_temporal": 4}
CASES: list[tuple[str, int | None, int]] = [
    ("encode", None, 1),
    ("encode", None, 5),
    ("encode", None, 9),
    ("encode", 512, 5),
    ("decode", 768, 5),
    ("decode", 768, 9),
    ("decode", 512, 5),
]
"""What is done, in tiles of which side, with how many frames."""


def write_weights(folder: Path, *, base_dim: int, decoder_base_dim: int) -> int:
    """The network's folder as diffusers has it; returns how many parameters it has."""
    from diffusers import AutoencoderKLWan

    statistics = {"latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}
    with torch.device("meta"):
        model: Any = AutoencoderKLWan(base_dim=base_dim, decoder_base_dim=decoder_base_dim, **FORM, **statistics)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.02)
    model.save_pretrained(folder / "vae")
    return sum(parameter.numel() for parameter in model.parameters())


def measure(
    folder: str, what: str, tile: int | None, frames: int, size: tuple[int, int], threads: int, answer: Any
) -> None:
    """One case: gibibytes before and at most, and seconds."""
    torch.set_num_threads(threads)
    codec = Wan22(path=folder, dtype="bfloat16", **{f"{what}_tile": tile})
    loaded, began = _peak(), time.perf_counter()
    height, width = size
    with torch.inference_mode():
        if what == "encode":
            made = codec.encode_raw(torch.rand(1, 3, frames, height, width) * 2 - 1)
        else:
            made = codec.decode_raw(torch.randn(1, 48, (frames - 1) // 4 + 1, height // 16, width // 16))
    answer.send(
        {"shape": list(made.shape), "loaded_gib": loaded, "peak_gib": _peak(), "s": time.perf_counter() - began}
    )


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="a tiny network and small pictures")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    width, size = ((8, 8), (256, 256)) if arguments.smoke else ((160, 256), (HEIGHT, WIDTH))
    context, rows = multiprocessing.get_context("spawn"), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="bench_codec_memory_") as folder:
        made = context.Process(target=_written, args=(folder, *width))  # its memory is not what is measured
        made.start()
        made.join()
        if made.exitcode:
            sys.exit(f"the weights could not be written (exit {made.exitcode})")
        parameters = json.loads((Path(folder) / "parameters.json").read_text())
        for what, tile, frames in CASES:
            if arguments.smoke:
                tile = tile and 192
            here, there = context.Pipe()
            child = context.Process(target=measure, args=(folder, what, tile, frames, size, arguments.threads, there))
            child.start()
            there.close()
            try:
                found = here.recv()
            except EOFError:
                child.join()
                found = {"error": f"ended with {child.exitcode}"}
            child.join()
            rows.append({"what": what, "tile": tile, "frames": frames, **found})
            Console(stderr=True, width=110).print(rows[-1])
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "git": git_state(),
        "machine": machine(PRESETS["smoke"]),
        "parameters": parameters,
        "size": list(size),
        "dtype": "bfloat16",
        "rows": rows,
    }
    _show(result)
    if arguments.out:
        write_json(arguments.out, result)
    if any("error" in row for row in rows):
        sys.exit(1)


def _written(folder: str, base_dim: int, decoder_base_dim: int) -> None:
    count = write_weights(Path(folder), base_dim=base_dim, decoder_base_dim=decoder_base_dim)
    write_json(Path(folder) / "parameters.json", count)


def _show(result: dict[str, Any]) -> None:
    height, width = result["size"]
    table = Table(title=f"{result['parameters'] / 1e6:.0f} M parameters, bfloat16, {height}x{width}")
    for title in ("", "tile", "frames", "loaded GiB", "peak GiB", "s"):
        table.add_column(title, justify="right" if title else "left")
    for row in result["rows"]:
        tile = "whole" if row["tile"] is None else str(row["tile"])
        figures = (f"{row['loaded_gib']:.1f}", f"{row['peak_gib']:.1f}", f"{row['s']:.0f}") if "s" in row else ()
        table.add_row(row["what"], tile, str(row["frames"]), *(figures or (row["error"],)))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
