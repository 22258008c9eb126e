"""How pleasing pictures are to people, by a head over CLIP image embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ovi.data.media import Clip
from ovi.data.stages.base import STAGES, ClipFilter, Limit
from ovi.errors import OviError


@STAGES.register("aesthetic")
class Aesthetic(ClipFilter):
    """Keeps clips of a high aesthetic score, by LAION's predictor on CLIP embeddings.

    Source: Schuhmann et al., "LAION-5B", 2022. Pictures are embedded by CLIP, the embeddings brought to length 1, and
    scored by a chain of linear layers; the figure ``aesthetic`` is the mean over pictures. Published heads: the file
    ``sac+logos+ava1-l14-linearMSE.pth`` of christophschuhmann/improved-aesthetic-predictor (CLIP ViT-L/14, scores of
    about 1 to 10), and the single layers of LAION-AI/aesthetic-predictor. A head goes with one CLIP alone.

    Args:
        clip: folder of the CLIP model in transformers' format, with ``preprocessor_config.json``.
        head: weights of the head, a .pth or .safetensors file of linear layers.
        min_score: None is no limit.
        num_pictures: scored of every clip, spread evenly.
        device: where CLIP runs.
    """

    name = "aesthetic"
    needs = frozenset({"video"})

    def __init__(
        self, *, clip: str, head: str, min_score: float | None = 4.5, num_pictures: int = 4, device: str = "cpu"
    ) -> None:
        if num_pictures < 1:
            raise OviError(f"aesthetic.num_pictures must be at least 1, got {num_pictures}")
        self.limits = (Limit("aesthetic", "unaesthetic", "aesthetic.min_score", low=min_score),)
        self.num_pictures, self.device = num_pictures, device
        self.head = [(w.to(device), b.to(device)) for w, b in load_head(head)]
        self.network, self.processor = _load_clip(clip, device)
        embeds, takes = self.network.config.projection_dim, self.head[0][0].shape[1]
        if embeds != takes:
            raise OviError(
                f"aesthetic.head={head} takes embeddings of {takes}, but the CLIP of aesthetic.clip={clip} gives "
                f"{embeds}: a head goes with the CLIP it was trained on (768 is ViT-L/14)"
            )

    def measure(self, clip: Clip) -> Mapping[str, float]:
        chosen = [int((n + 0.5) / self.num_pictures * len(clip.frames)) for n in range(self.num_pictures)]
        pixels = self.processor(images=[clip.frames[n] for n in chosen], return_tensors="pt")["pixel_values"]
        with torch.inference_mode(), torch.autocast(torch.device(self.device).type, enabled=False):
            embedding = self.network(pixel_values=pixels.to(self.device)).image_embeds
            score = embedding / embedding.norm(dim=-1, keepdim=True)
            for weight, bias in self.head:
                score = score @ weight.T + bias
        return {"aesthetic": float(score.mean())}


def load_head(path: str | Path) -> list[tuple[Tensor, Tensor]]:
    """(weight [out, in], bias [out]) of the head's linear layers in order; the last has one output.

    Published heads have nothing but dropout between their layers.

    Raises:
        OviError: for a file that is missing, unreadable, or holds anything else.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise OviError(f"aesthetic.head={path}: there is no such file; it needs the weights of an aesthetic head")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling a stranger's file raises
        raise OviError(f"aesthetic.head={path}: cannot be read as weights ({type(error).__name__}: {error})") from error
    names = [n for n in state if n.endswith("weight")] if isinstance(state, Mapping) else []
    layers = []
    for name in names:
        weight, bias = state[name], state.get(f"{name.removesuffix('weight')}bias")
        if weight.ndim != 2 or bias is None or bias.shape != weight.shape[:1]:
            raise OviError(f"aesthetic.head={path}: {name} is no linear layer with a bias; expected only such")
        layers.append((weight.float(), bias.float()))
    fits = all(a[0].shape[0] == b[0].shape[1] for a, b in pairwise(layers))
    if not layers or not fits or layers[-1][0].shape[0] != 1 or len(state) != 2 * len(layers):
        shapes = {name: list(state[name].shape) for name in names}
        raise OviError(f"aesthetic.head={path}: expected linear layers that end in one output, got {shapes or 'none'}")
    return layers


def _load_clip(path: str, device: str) -> tuple[Any, Any]:
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise OviError(
            f"aesthetic.clip={path}: is no folder of a transformers model (config.json is missing); for LAION's head "
            "it needs openai/clip-vit-large-patch14, downloaded"
        )
    try:
        loaded: Any = CLIPVisionModelWithProjection.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
        network, loading = loaded
        processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise OviError(f"aesthetic.clip={path}: cannot be loaded as CLIP ({error})") from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise OviError(f"aesthetic.clip={path}: {len(missing)} weights are missing, the first {missing[0]}")
    return network.to(device).eval().requires_grad_(False), processor
