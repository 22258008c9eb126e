"""What the real sizes would cost on a GPU that is not at hand: computed, not measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import work
from setting import PRESETS, Setting


@dataclass(frozen=True)
class Chip:
    """Rates from a data sheet.

    Args:
        flops_per_s: dense matrix products, bfloat16.
        bytes_per_s: of its memory.
    """

    name: str
    flops_per_s: float
    bytes_per_s: float


H100 = Chip("NVIDIA H100 SXM, data sheet", 989e12, 3.35e12)

TARGET_SHARE = {"forward": 0.60, "step": 0.55}
"""Shares of the matmul peak that are aimed at."""

BF16_BYTES = 2

DEFINITIONS = {
    "flops": "matrix products and attentions of the published arithmetic in closed form, prompts padded to 512 rows; "
    "a multiply-add counts two",
    "bytes": "operands and results of every product and attention, once each in bfloat16, all else taken as fused "
    "into them and attention scores as never leaving the chip: a lower bound for kernels of one product each",
    "floor_s": "the longer of flops / peak and bytes / bandwidth: nothing that does this arithmetic in bfloat16 runs "
    "faster on this chip",
    "at_target_share_s": "flops / (target share x data-sheet peak); the peak that torch.mm reaches is lower than the "
    "data sheet's, so the same share of it takes longer",
}


def computed_floor(chip: Chip = H100) -> dict[str, Any]:
    """FLOPs, bytes and the times that follow for 720x720, 5 s, batch 1, bfloat16: 4 layers and the published 30."""
    four = PRESETS["gpu"]
    return {
        "computed, not measured": True,
        "chip": asdict(chip),
        "target_share": TARGET_SHARE,
        "definitions": DEFINITIONS,
        "settings": {f"{s.layers} layers": _floor(s, chip) for s in (four, replace(four, layers=30))},
    }


def _floor(setting: Setting, chip: Chip) -> dict[str, Any]:
    works = list(work.twin(setting))
    amounts = {
        "forward": (work.forward_flops(works), work.forward_elements(works)),
        "step": (work.step_flops(works), work.step_elements(works)),
    }
    costs = {}
    for kind, (flops, elements) in amounts.items():
        computing_s, moving_s = flops / chip.flops_per_s, elements * BF16_BYTES / chip.bytes_per_s
        costs[kind] = {
            "flops": flops,
            "bytes": elements * BF16_BYTES,
            "flops_at_peak_s": computing_s,
            "bytes_at_bandwidth_s": moving_s,
            "floor_s": max(computing_s, moving_s),
            "at_target_share_s": computing_s / TARGET_SHARE[kind],
        }
    return {"setting": setting.to_dict(), **costs}
