"""Key names of a twin or a tower as each publisher writes them, and ours.

The published names are those of spec 'Checkpoint keys'; Wan2.2-TI2V-5B is the video tower that Ovi started from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from ovi.errors import OviError

MODALITIES = ("video", "audio")


@dataclass(frozen=True)
class Scheme:
    """How one publisher names tensors.

    Args:
        name: what to call it in messages.
        table: (theirs, ours); the first that matches counts. {m} is a modality, {n} a block, {p} the rest of the name.
    """

    name: str
    table: tuple[tuple[str, str], ...]

    def to_ours(self, theirs: str) -> str | None:
        """Our name of one of their tensors; None for a name that is not of the scheme."""
        return _renamed(theirs, self.table)

    def from_ours(self, ours: str) -> str | None:
        """Their name of one of our tensors; None for one that they have no name for."""
        return _renamed(ours, tuple((b, a) for a, b in self.table))


PUBLISHED = Scheme(
    "published Ovi",
    (
        ("video_model.patch_embedding.{p}", "video.patch_embedding.proj.{p}"),
        ("audio_model.patch_embedding.0.{p}", "audio.patch_embedding.proj.{p}"),
        ("audio_model.patch_embedding.2.{p}", "audio.patch_embedding.mix.{p}"),
        ("{m}_model.blocks.{n}.modulation.modulation", "{m}.blocks.{n}.modulation"),
        # The reference keeps a pair's fusion in the block that queries.
        ("{m}_model.blocks.{n}.cross_attn.k_fusion.{p}", "fusions.{n}.{m}.k.{p}"),
        ("{m}_model.blocks.{n}.cross_attn.v_fusion.{p}", "fusions.{n}.{m}.v.{p}"),
        ("{m}_model.blocks.{n}.cross_attn.pre_attn_norm_fusion.{p}", "fusions.{n}.{m}.norm.{p}"),
        ("{m}_model.blocks.{n}.cross_attn.norm_k_fusion.{p}", "fusions.{n}.{m}.norm_k.{p}"),
        ("{m}_model.head.modulation", "{m}.out.modulation"),
        ("{m}_model.head.head.{p}", "{m}.out.head.{p}"),
        ("{m}_model.{p}", "{m}.{p}"),
    ),
)

OURS = Scheme("ovi train", tuple((part + ".{p}", part + ".{p}") for part in (*MODALITIES, "fusions")))


def _bare(modality: str) -> Scheme:
    """The published names of one tower without the prefix that says which; so Wan2.2's own files are written."""
    prefixes = (f"{modality}_model.", "{m}_model.")
    rows = [
        (theirs.removeprefix(prefix).replace("{m}", modality), ours.replace("{m}", modality))
        for theirs, ours in PUBLISHED.table
        for prefix in prefixes
        if theirs.startswith(prefix)
    ]
    table = ("blocks.{n}.modulation", modality + ".blocks.{n}.modulation")
    return Scheme(f"one {modality} tower in Wan2.2's names", (table, *rows))


WAN = {modality: _bare(modality) for modality in MODALITIES}

DIFFUSERS = Scheme(
    "diffusers' WanTransformer3DModel",
    (
        ("patch_embedding.{p}", "video.patch_embedding.proj.{p}"),
        ("condition_embedder.text_embedder.linear_1.{p}", "video.text_embedding.0.{p}"),
        ("condition_embedder.text_embedder.linear_2.{p}", "video.text_embedding.2.{p}"),
        ("condition_embedder.time_embedder.linear_1.{p}", "video.time_embedding.0.{p}"),
        ("condition_embedder.time_embedder.linear_2.{p}", "video.time_embedding.2.{p}"),
        ("condition_embedder.time_proj.{p}", "video.time_projection.1.{p}"),
        *(
            (f"blocks.{{n}}.{theirs}.{part}.{{p}}", f"video.blocks.{{n}}.{ours}.{projection}.{{p}}")
            for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn"))
            for part, projection in (
                ("to_q", "q"),
                ("to_k", "k"),
                ("to_v", "v"),
                ("to_out.0", "o"),
                ("norm_q", "norm_q"),
                ("norm_k", "norm_k"),
            )
        ),
        ("blocks.{n}.norm2.{p}", "video.blocks.{n}.norm3.{p}"),
        ("blocks.{n}.ffn.net.0.proj.{p}", "video.blocks.{n}.ffn.0.{p}"),
        ("blocks.{n}.ffn.net.2.{p}", "video.blocks.{n}.ffn.2.{p}"),
        ("blocks.{n}.scale_shift_table", "video.blocks.{n}.modulation"),
        ("scale_shift_table", "video.out.modulation"),
        ("proj_out.{p}", "video.out.head.{p}"),
    ),
)


def find_scheme(names: Iterable[str]) -> Scheme | None:
    """The scheme that a checkpoint's names are of; None for none that we know."""
    names = set(names)
    if any(name.startswith(("video_model.", "audio_model.")) for name in names):
        return PUBLISHED
    if any(name.startswith("condition_embedder.") for name in names):
        return DIFFUSERS
    if "patch_embedding.0.weight" in names:
        return WAN["audio"]
    if "patch_embedding.weight" in names:
        return WAN["video"]
    if any(name.startswith(("video.", "audio.")) for name in names):
        return OURS
    return None


def to_our_name(published: str) -> str | None:
    """Our name of a published tensor; None for a name that is not of the scheme."""
    return PUBLISHED.to_ours(published)


def to_published_name(ours: str) -> str | None:
    """The published name of one of our tensors; None for a name that no published model has."""
    return PUBLISHED.from_ours(ours)


def as_ours(name: str, tensor: Tensor) -> Tensor:
    """A tensor of any scheme in the shape we keep it in, given our name of it.

    All others keep a leading axis of 1 on their modulation tables.
    """
    leading = name.endswith(".modulation") and tensor.dim() == 3 and tensor.shape[0] == 1
    return tensor.squeeze(0) if leading else tensor


def from_reference(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in published names to ours; names it does not know are kept, so that loading reports them."""
    names = {key: to_our_name(key) or key for key in state}
    return {names[key]: as_ours(names[key], tensor) for key, tensor in state.items()}


def to_reference(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict to published names; the inverse of ``from_reference``, bit for bit.

    Raises:
        OviError: for tensors that published models have no name for, such as those of another fusion.
    """
    names = {key: to_published_name(key) for key in state}
    unknown = [key for key, name in names.items() if name is None]
    if unknown:
        raise OviError(
            f"published checkpoints have no name for {some(unknown)}: only a twin with the fusion 'ovi' and the "
            "patches 'video' and 'audio' can be saved as one"
        )
    return {
        str(names[key]): tensor.unsqueeze(0) if str(names[key]).endswith("modulation") else tensor
        for key, tensor in state.items()
    }


def some(names: list[str], most: int = 8) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str | None:
    for source, target in table:
        found = _pattern(source).fullmatch(name)
        if found:
            return target.format(**found.groupdict())
    return None


@cache
def _pattern(template: str) -> re.Pattern[str]:
    pattern = re.escape(template).replace(r"\{m\}", "(?P<m>video|audio)").replace(r"\{n\}", r"(?P<n>\d+)")
    return re.compile(pattern.replace(r"\{p\}", "(?P<p>.+)"))
