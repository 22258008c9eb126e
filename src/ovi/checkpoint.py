"""Published key names and ours, both ways (spec/ovi-model.md, 'Checkpoint keys')."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_SAME = r"(text_embedding\.[02]|time_embedding\.[02]|time_projection\.1)\.(weight|bias)"

# (published pattern, our template, shape change on the way in). A tower's own names first, then the pair's fusion,
# which the reference stores in the block that queries.
_NAMES: list[tuple[str, str]] = [
    (r"(video|audio)_model\.patch_embedding\.(weight|bias)", r"\1.patch_embedding.proj.\2"),
    (r"(audio|video)_model\.patch_embedding\.0\.(weight|bias)", r"\1.patch_embedding.proj.\2"),
    (r"(audio|video)_model\.patch_embedding\.2\.(w[123])\.weight", r"\1.patch_embedding.mix.\2.weight"),
    (rf"(video|audio)_model\.{_SAME}", r"\1.\2.\3"),
    (r"(video|audio)_model\.blocks\.(\d+)\.modulation\.modulation", r"\1.blocks.\2.modulation"),
    (r"(video|audio)_model\.blocks\.(\d+)\.cross_attn\.k_fusion\.(weight|bias)", r"fusions.\2.\1.k.\3"),
    (r"(video|audio)_model\.blocks\.(\d+)\.cross_attn\.v_fusion\.(weight|bias)", r"fusions.\2.\1.v.\3"),
    (r"(video|audio)_model\.blocks\.(\d+)\.cross_attn\.pre_attn_norm_fusion\.(weight|bias)", r"fusions.\2.\1.norm.\3"),
    (r"(video|audio)_model\.blocks\.(\d+)\.cross_attn\.norm_k_fusion\.weight", r"fusions.\2.\1.norm_k.weight"),
    (r"(video|audio)_model\.blocks\.(\d+)\.(self_attn|cross_attn|norm3|ffn)\.(.+)", r"\1.blocks.\2.\3.\4"),
    (r"(video|audio)_model\.head\.modulation", r"\1.out.modulation"),
    (r"(video|audio)_model\.head\.head\.(weight|bias)", r"\1.out.head.\2"),
]


def from_reference(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in published names to ours; names it does not know are kept, so that loading reports them."""
    ours = {}
    for key, tensor in state.items():
        name = next((re.sub(f"^{p}$", t, key) for p, t in _NAMES if re.fullmatch(p, key)), key)
        # The reference keeps a leading axis of 1 on its modulation tables.
        ours[name] = tensor.squeeze(0) if name.endswith("modulation") and tensor.dim() == 3 else tensor
    return ours
