"""``ovi sample``: prompts to mp4s with sound."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from ovi.commands.hydra_app import run
from ovi.commands.prompt_table import read_prompt_table
from ovi.errors import OviError

if TYPE_CHECKING:
    from ovi.data.media import Clip


def main(argv: list[str]) -> None:
    """Compose ``conf/sample.yaml`` and generate."""
    run("sample", sample_prompts, argv)


def sample_prompts(config: DictConfig) -> list[Path]:
    """Write one mp4 a prompt, and ``samples.jsonl`` with file and prompt of each; returns the mp4s."""
    from rich.console import Console
    from rich.progress import track

    from ovi.attention import use_attention
    from ovi.commands.restore import restore

    prompts = read_prompts(config.prompts)
    restored = restore(config.checkpoint, config.get("codec_paths"))
    generator = instantiate(config.generation, _convert_="all")
    negatives = config.negative_video, config.negative_audio
    check_guidance(generator, restored.record["text_dropout"], negatives, config.checkpoint)
    use_attention(restored.model, instantiate(config.attention, _convert_="all"))
    if config.compile:
        restored.model.compile_layers()
    console = Console()
    written = write_samples(
        restored,
        generator,
        prompts,
        Path(config.out),
        size=tuple(config[name] or restored.record[name] for name in ("num_frames", "height", "width")),
        device=config.device,
        negatives=negatives,
        first_frame=config.first_frame,
        track=lambda clips: track(clips, "sampling", total=len(prompts), console=console),
    )
    console.print(f"{len(written)} clips from step {restored.step} in {config.out}")
    return written


def write_samples(
    restored: Any,
    generator: Any,
    prompts: list[str],
    out: Path,
    *,
    size: tuple[int, int, int] | None = None,
    device: str = "auto",
    negatives: tuple[str, str] = ("", ""),
    first_frame: str | None = None,
    track: Any = iter,
) -> list[Path]:
    """Generate a clip for every prompt and write it to a folder.

    Args:
        restored: model and codecs.
        generator: how clips are generated.
        prompts: one a clip.
        out: folder for the mp4s and ``samples.jsonl``.
        size: (frames, height, width) in pixels; None takes those of training.
        device: "auto" takes an accelerator where there is one.
        negatives: negative prompts of video and audio; empty for no text at all.
        first_frame: picture that every clip starts with.
        track: wraps the iterator of clips, for a progress bar.

    Returns:
        Paths of the mp4s, in the order of the prompts.
    """
    from ovi.data.files import whole_file
    from ovi.data.media import write_clip

    clips = generated_clips(
        restored, generator, prompts, size=size, device=device, negatives=negatives, first_frame=first_frame
    )
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for number, clip in enumerate(track(clips)):
        written.append(out / f"{number:03d}.mp4")
        write_clip(written[-1], clip)
    lines = [json.dumps({"file": path.name, "caption": p}, ensure_ascii=False) for path, p in zip(written, prompts)]
    with whole_file(out / "samples.jsonl") as file:
        file.write("".join(f"{line}\n" for line in lines).encode())
    return written


_OF_SAMPLING = ("generation", "set", "negative_video", "negative_audio", "num_frames", "height", "width")
_BY_ARGUMENT = ("device", "first_frame")


@dataclass(frozen=True)
class Sampling:
    """How a program asked for clips.

    Attributes:
        generation: node that a generator is made of.
        negatives: negative prompts of video and audio; empty for no text at all.
        size: frames, height and width in pixels; None where that of training is meant.
    """

    generation: dict[str, Any]
    negatives: tuple[str, str]
    size: tuple[int | None, int | None, int | None]


def sampling_asked(overrides: Sequence[str], own: Mapping[str, Any] | None = None) -> Sampling:
    """What overrides of ``ovi sample`` ask for in a program.

    Args:
        overrides: of ``generation``, ``set``, the negative prompts and the size.
        own: how a run generates, in which the overrides change what they name; a ``set``, or another ``generation``,
            takes its place. None for the defaults of ``ovi sample``.

    Raises:
        OviError: for overrides of something else, or that do not compose.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from ovi.commands.compose import compose, task_config
    from ovi.commands.hydra_app import hydra_errors_as_ours

    with hydra_errors_as_ours():
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    for override in parsed:
        name = re.split(r"[./]", override.key_or_group)[0]
        if override.is_delete() or name not in _OF_SAMPLING:
            hint = f"; {name} is an argument beside them" if name in _BY_ARGUMENT else ""
            raise OviError(f"{override.input_line}: overrides here set {', '.join(_OF_SAMPLING)}{hint}")

    # Components before their settings, in whatever order they were typed.
    of_generation = [o for o in parsed if re.split(r"[./]", o.key_or_group)[0] == "generation"]
    of_generation.sort(key=lambda o: "/" not in o.key_or_group)
    if own is None or any(o.key_or_group in ("set", "generation") for o in parsed):
        words, node = list(overrides), None
    else:
        words = [str(o.input_line) for o in parsed if o not in of_generation or "/" in o.key_or_group]
        node = OmegaConf.create(dict(own))
    config = task_config(compose("sample", ["checkpoint=none", "prompts=none", *words]))
    if node is None:
        node = config.generation
    else:
        for override in of_generation:
            path = override.key_or_group.replace("/", ".").removeprefix("generation").removeprefix(".")
            if "/" in override.key_or_group:
                OmegaConf.update(node, path, OmegaConf.select(config.generation, path), merge=False, force_add=True)
            else:
                _set(node, path, override)
    return Sampling(
        OmegaConf.to_container(node, resolve=True),  # type: ignore[arg-type]
        (config.negative_video, config.negative_audio),
        (config.num_frames, config.height, config.width),
    )


def _set(node: Any, path: str, override: Any) -> None:
    """Change a setting that a node has, as an override typed."""
    missing = object()
    parent = OmegaConf.select(node, path.rpartition(".")[0]) if "." in path else node
    if OmegaConf.select(node, path, default=missing) is missing and not override.is_add():
        there = ", ".join(str(name) for name in parent if name != "_target_") if OmegaConf.is_dict(parent) else "none"
        raise OviError(f"no setting {override.key_or_group!r} in how this run generates; beside it there is {there}")
    OmegaConf.update(node, path, override.value(), merge=True, force_add=True)


def check_guidance(generator: Any, text_dropout: float, negatives: tuple[str, str], what: str) -> None:
    """See that guidance away from no text means something to a network.

    Raises:
        OviError: for one that was trained without text dropout, where no negative prompts are given.
    """
    if generator.guidance.needs_negative and not text_dropout and not all(negatives):
        raise OviError(
            f"{what} was trained without text dropout, so it does not know what no text means and cannot "
            "be guided away from it: use generation/guidance=none, give negative_video and negative_audio, or train "
            "with flow.text_dropout=0.1"
        )


def check_validation(config: DictConfig) -> None:
    """See that a run of ``ovi train`` will know what its validation guides away from.

    Raises:
        OviError: for guidance away from no text in training without text dropout.
    """
    if config.callbacks.get("joint_eval") is None or config.flow.text_dropout:
        return
    if instantiate(config.generation, _convert_="all").guidance.needs_negative:
        raise OviError(
            "validation generates clips guided away from no text, and with flow.text_dropout=0 the run does not know "
            "what no text means: set flow.text_dropout=0.1, generation/guidance=none, or callbacks.joint_eval=null"
        )


def generated_clips(
    restored: Any,
    generator: Any,
    prompts: list[str],
    *,
    size: tuple[int, int, int] | None = None,
    device: str = "auto",
    negatives: tuple[str, str] = ("", ""),
    first_frame: str | None = None,
) -> Iterator[Clip]:
    """Generate a clip for every prompt, one after another; arguments as for ``write_samples``."""
    import torch

    from ovi.guidance import no_text

    # A CUDA build names CUDA as the current accelerator on a machine without a GPU too: ask whether it is there.
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    chosen = (found or torch.device("cpu")) if device == "auto" else torch.device(device)
    codecs, model = restored.codecs.to(chosen), restored.model.to(chosen)
    size = size or tuple(restored.record[name] for name in ("num_frames", "height", "width"))
    shapes = codecs.latent_shapes(*size)
    texts = [t.to(chosen) for t in codecs.text.encode(prompts)]
    without = no_text(texts[0])
    negative = [codecs.text.encode([n])[0].to(chosen) if n else without for n in negatives]
    given = None
    if first_frame is not None:
        given = encode_first_frame(codecs, first_frame, size[1], size[2]).expand(len(prompts), -1, -1, -1, -1)
    clips: Iterator[Clip] = generator.clips(
        model,
        codecs,
        (shapes["video"], shapes["audio"]),
        texts,
        range(len(prompts)),
        negatives=(negative[0], negative[1]),
        first_frame=given,
    )
    return clips


def encode_first_frame(codecs: Any, picture: str, height: int, width: int) -> Any:
    """Latent [1, C, 1, h, w] of a picture, scaled and cropped about its centre.

    Raises:
        OviError: when the codec cannot encode one frame alone, or the picture cannot be read.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    video = codecs.video
    if video.temporal_stride > 1 and not video.causal_first_frame:
        raise OviError("first_frame needs a video codec that encodes one frame alone (causal_first_frame)")
    try:
        image = ImageOps.fit(Image.open(picture).convert("RGB"), (width, height))
    except OSError as error:
        raise OviError(f"first_frame={picture}: cannot be read as a picture ({error})") from error
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    with torch.no_grad():
        return video.encode(pixels[None, :, None].to(video.mean.device))


def read_prompts(given: str | ListConfig) -> list[str]:
    """Prompts as typed, or those of a .txt, .jsonl or .csv file.

    Raises:
        OviError: when a file has none, or a line of it is not what its suffix says.
    """
    if isinstance(given, ListConfig):
        prompts = [str(p) for p in given]
    elif Path(given).suffix in (".txt", ".jsonl", ".csv"):
        return [prompt.caption for prompt in read_prompt_table(given)]
    else:
        prompts = [given]
    if not prompts:
        raise OviError(f"prompts={given}: holds no prompt")
    return prompts
