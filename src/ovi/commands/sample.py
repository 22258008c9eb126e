"""``ovi sample``: prompts to mp4s with sound."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
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


_BY_ARGUMENT = {
    "num_frames": "size",
    "height": "size",
    "width": "size",
    "device": "device",
    "first_frame": "first_frame",
}
_OF_SAMPLING = ("generation", "set", "negative_video", "negative_audio")


def sampling_asked(
    overrides: Sequence[str], own: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], tuple[str, str]]:
    """What overrides of ``ovi sample`` ask for in a program.

    Args:
        overrides: of ``generation``, ``set`` and the negative prompts.
        own: how a run generates: counts in all that the overrides leave open; None for the defaults of ``ovi sample``.

    Returns:
        The node that a generator is made of, and the negative prompts of video and audio.

    Raises:
        OviError: for overrides of something else, or that do not compose.
    """
    from ovi.commands.compose import compose, task_config

    keys = [override.lstrip("+~").partition("=")[0] for override in overrides]
    for key in keys:
        name = re.split(r"[./@]", key)[0]
        if name not in _OF_SAMPLING:
            instead = f": give {_BY_ARGUMENT[name]}=... beside them" if name in _BY_ARGUMENT else ""
            raise OviError(f"overrides here are of {', '.join(_OF_SAMPLING)}, not of {name}{instead}")

    def composed(words: Sequence[str]) -> dict[str, Any]:
        config = task_config(compose("sample", ["checkpoint=none", "prompts=none", *words]))
        return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]

    asked = composed(overrides)
    node = asked["generation"]
    if own is not None and overrides:
        node = _laid_over(own, node, composed([])["generation"], keys, "generation")
    elif own is not None:
        node = dict(own)
    return node, (asked["negative_video"], asked["negative_audio"])


def _laid_over(
    own: Mapping[str, Any], asked: Mapping[str, Any], usual: Mapping[str, Any], keys: Sequence[str], path: str
) -> dict[str, Any]:
    """A component's own settings with those that were asked for; where another component is, all of its."""
    if asked.get("_target_") != usual.get("_target_") or path.replace(".", "/") in keys:
        return dict(asked)
    node = dict(own)
    for name, value in asked.items():
        if isinstance(value, dict) and isinstance(own.get(name), Mapping):
            node[name] = _laid_over(own[name], value, usual[name], keys, f"{path}.{name}")
        elif value != usual.get(name) or f"{path}.{name}" in keys:
            node[name] = value
    return node


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
        OviError: as ``check_guidance``.
    """
    if config.callbacks.get("joint_eval") is not None:
        generator = instantiate(config.generation, _convert_="all")
        check_guidance(generator, config.flow.text_dropout, ("", ""), "what validation generates with")


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
