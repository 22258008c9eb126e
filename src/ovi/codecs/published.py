"""What codecs with published weights share: finding the files, strict loading, a digest, statistics that stay."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ovi.codecs.base import LatentCodec, Moments
from ovi.errors import OviError

logger = logging.getLogger(__name__)

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""``owner/name``: what is no folder here and looks like this is taken for a hub repository."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class PublishedLatents(LatentCodec):
    """A latent codec whose weights and statistics come from a checkpoint: nothing is fitted, other weights refused."""

    weight_files: tuple[Path, ...]

    @cached_property
    def weights_sha256(self) -> str:
        """Digest of the weight files."""
        return files_sha256(self.weight_files)

    def gather(self, moments: Moments, signal: Tensor) -> None:
        """Nothing: the statistics are the checkpoint's."""

    def set_statistics(self, moments: Moments) -> None:
        """Nothing: the statistics are the checkpoint's."""

    def fit(self, signals: Iterable[Tensor]) -> None:
        """Nothing: the statistics are the checkpoint's."""

    def state(self) -> dict[str, Any]:
        """JSON-ready statistics, and the digest of the weights that encode and decode."""
        return {**super().state(), "weights_sha256": self.weights_sha256}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take stored statistics.

        Raises:
            OviError: when they belong to other weights, or to another number of channels.
        """
        same_weights(type(self).__name__, state.get("weights_sha256"), self.weights_sha256, self.weight_files)
        super().load_state(state)


def same_weights(codec: str, stored: str | None, mine: str, files: Sequence[Path]) -> None:
    """Refuse latents or embeddings of other weights.

    Raises:
        OviError: when the digests differ.
    """
    if stored != mine:
        raise OviError(
            f"{codec}: the shards were encoded with weights of sha256 {str(stored)[:16]}..., but "
            f"{', '.join(map(str, files))} has {mine[:16]}...: point path to the weights they were encoded with"
        )


def files_sha256(files: Sequence[Path]) -> str:
    """The sha256 of a single file, as a hub shows it; of several, that of ``sha256sum``'s lines for them."""
    digests = []
    for file in files:
        with open(file, "rb") as content:
            digests.append((hashlib.file_digest(content, "sha256").hexdigest(), file.name))
    if len(digests) == 1:
        return digests[0][0]
    return hashlib.sha256("".join(f"{digest}  {name}\n" for digest, name in digests).encode()).hexdigest()


def first_line(error: Exception) -> str:
    """Kind of an error of a library, and how its message begins."""
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"


def find_dtype(codec: str, name: str) -> torch.dtype:
    """The type that a ``dtype`` knob names.

    Raises:
        OviError: for another name.
    """
    if name not in DTYPES:
        raise OviError(f"{codec}: dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def weights_folder(codec: str, path: str, *, repo: str, patterns: Sequence[str], expected: str) -> Path:
    """The folder ``path``, or where the hub's library keeps its copy of the repository ``path``.

    Args:
        codec: registry name, for messages.
        path: a folder, or ``owner/name`` of a hub repository.
        repo: the repository that holds the published weights.
        patterns: files that are needed of a repository.
        expected: what the folder must hold, in words.

    Raises:
        OviError: when there is no such folder and no such repository to be had.
    """
    folder = Path(str(path)).expanduser()
    if folder.is_dir():
        return folder
    wanted = f"set path to a folder with {expected}, or to the hub repository {repo}"
    if not HUB_NAME.fullmatch(str(path)):
        raise OviError(f"{codec}: path={path} is no folder; {wanted}")
    from huggingface_hub import snapshot_download

    logger.warning("%s: no folder %s here; taking it for a hub repository: %s", codec, path, ", ".join(patterns))
    try:
        return Path(snapshot_download(str(path), allow_patterns=list(patterns)))
    except Exception as error:  # a library's and a network's errors have no common base
        raise OviError(
            f"{codec}: path={path} is no folder here, and as a hub repository it could not be fetched "
            f"({first_line(error)}); {wanted}"
        ) from error


def safetensors_files(codec: str, folder: Path, stem: str, *, repo: str) -> tuple[Path, ...]:
    """``stem.safetensors`` in a folder, or the parts that ``stem.safetensors.index.json`` lists; ``config.json`` too.

    Raises:
        OviError: when the config or a part is not there.
    """
    index = folder / f"{stem}.safetensors.index.json"
    names = [f"{stem}.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    missing = [name for name in ("config.json", *names) if not (folder / name).is_file()]
    if missing:
        raise OviError(
            f"{codec}: {folder} lacks {', '.join(missing)}; it must be a copy of that folder of {repo} with "
            f"safetensors weights: check path"
        )
    return tuple(folder / name for name in names)


def read_safetensors(codec: str, files: Sequence[Path]) -> dict[str, Tensor]:
    """Tensors of all files, mapped from disk.

    Raises:
        OviError: when a file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors.update(load_file(file))
        except (SafetensorError, OSError) as error:
            raise OviError(f"{codec}: {file} cannot be read ({error}); fetch it again") from error
    return tensors


def read_pickle(codec: str, file: Path) -> dict[str, Any]:
    """Content of a ``torch.save`` file that holds tensors and plain data alone.

    Raises:
        OviError: when it is damaged, or holds anything else.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for a bad file
        raise OviError(f"{codec}: {file} cannot be read ({first_line(error)}); fetch it again") from error
    if not isinstance(content, dict):
        raise OviError(f"{codec}: {file} holds {type(content).__name__}, expected a state dict; fetch it again")
    return content


def load_strictly(
    codec: str, module: nn.Module, tensors: Mapping[str, Tensor], source: Path, dtype: torch.dtype = torch.float32
) -> None:
    """Give a module its tensors, every one of them, and freeze it; floating-point ones become ``dtype``.

    Raises:
        OviError: for tensors that lack, are too many, or are of another shape.
    """
    own = module.state_dict()
    lacking = [name for name in own if name not in tensors]
    foreign = [name for name in tensors if name not in own]
    shapes = [
        f"{name} {list(tensors[name].shape)} for {list(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    wrong = [
        f"{len(names)} {kind}, such as {names[0]}"
        for kind, names in (("lacking", lacking), ("unknown", foreign), ("of another shape", shapes))
        if names
    ]
    if wrong:
        raise OviError(f"{codec}: {source} does not fit the model (tensors {'; '.join(wrong)}): check path")
    cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    module.load_state_dict(cast, assign=True)
    module.eval().requires_grad_(False)
