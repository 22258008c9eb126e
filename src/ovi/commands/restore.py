"""Checkpoints to models: what a run recorded about itself, and the twin and codecs built again from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ovi.adapters import merged_state
from ovi.checkpoint import without_storage
from ovi.codecs.bundle import Codecs, with_paths
from ovi.errors import OviError
from ovi.layout import LatentLayout
from ovi.twin import TwinDiT

RECORD = "ovi"
"""Key of a checkpoint under which a run keeps its record."""


@dataclass(frozen=True)
class Restored:
    """A trained twin (averaged weights where the run kept them), its codecs, and the run's record."""

    model: TwinDiT
    codecs: Codecs
    record: dict[str, Any]
    step: int


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path means: itself, or the last one of a run's folder.

    Raises:
        OviError: when there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    for candidate in (path / "checkpoints" / "last.ckpt", path / "last.ckpt"):
        if candidate.is_file():
            return candidate
    raise OviError(f"{path}: neither a checkpoint nor the folder of a run that has one (checkpoints/last.ckpt)")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of ``ovi train`` as a dictionary, on the host.

    Raises:
        OviError: when it cannot be read or has no record.
    """
    file = find_checkpoint(path)
    try:
        # Mapped, so that what is not asked for (the optimizer's state above all) is never read.
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for damaged files
        raise OviError(f"{file}: cannot be read as a checkpoint ({type(error).__name__}: {error})") from error
    if not isinstance(checkpoint, dict) or RECORD not in checkpoint:
        raise OviError(f"{file}: is no checkpoint of `ovi train`: it has no record of its model and codecs")
    return checkpoint


def make_record(
    model_config: Any,
    layout: LatentLayout,
    index: dict[str, Any],
    text_dropout: float,
    codec_paths: Mapping[str, str | None] | None = None,
) -> dict[str, Any]:
    """What a checkpoint keeps so that ``restore`` needs nothing else: plain data.

    Args:
        model_config: the resolved model node.
        layout: of the latents it was built for.
        index: content of the shard set's index.
        text_dropout: of its training: without any, guidance away from no text means nothing.
        codec_paths: where the codecs' weights lie, where the index says it wrongly.

    Raises:
        OviError: for paths that no codec takes.
    """
    return {
        "model": OmegaConf.to_container(model_config, resolve=True),
        "layout": layout.to_dict(),
        "text_dropout": text_dropout,
        "codecs": with_paths(index["codecs"], codec_paths),
        "num_frames": index["num_frames"],
        "height": index["height"],
        "width": index["width"],
    }


def restore(path: str | Path, codec_paths: Mapping[str, str | None] | None = None) -> Restored:
    """Build the twin and codecs of a checkpoint, weights loaded.

    Args:
        path: the checkpoint, or a run's folder.
        codec_paths: where the codecs' weights lie on this machine, as ``with_paths`` has it; None is where they lay.

    Raises:
        OviError: as ``read_checkpoint`` does, or when the codecs' weights or a plug-in that it needs are not there.
    """
    checkpoint = read_checkpoint(path)
    record = checkpoint[RECORD]
    codecs = Codecs.from_dict(record["codecs"], codec_paths)  # before a large twin: they may not be there
    model: TwinDiT = instantiate(record["model"], _convert_="all")(LatentLayout.from_dict(record["layout"]))
    model.load_state_dict(model_state(checkpoint))
    return Restored(model.eval(), codecs.eval(), record, int(checkpoint["global_step"]))


def mapped_twin(path: str | Path) -> TwinDiT:
    """The twin of a checkpoint whose weights stay in the file until they are used; for looking at them or copying.

    Raises:
        OviError: as ``read_checkpoint`` does, or when a plug-in that it needs is not installed.
    """
    checkpoint = read_checkpoint(path)
    record = checkpoint[RECORD]
    with without_storage():
        model: TwinDiT = instantiate(record["model"], _convert_="all")(LatentLayout.from_dict(record["layout"]))
    model.load_state_dict(model_state(checkpoint), assign=True)
    return model


def model_state(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The twin's own weights in a Lightning checkpoint, adapters merged into them."""
    state = {k.removeprefix("model."): v for k, v in checkpoint["state_dict"].items() if k.startswith("model.")}
    return merged_state(state, checkpoint[RECORD].get("adapter"))


def check_layout(record: dict[str, Any], layout: LatentLayout, what: str) -> None:
    """See that latents fit a recorded model.

    Raises:
        OviError: naming each difference.
    """
    differences = LatentLayout.from_dict(record["layout"]).differences(layout)
    if differences:
        raise OviError(
            f"{what} was trained on other latents than data.path holds: {'; '.join(differences)}. "
            "Encode the data with the codecs and fps it was trained with"
        )
