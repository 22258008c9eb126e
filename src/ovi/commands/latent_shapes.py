"""Whether a model takes the latents of a set, found out without any of them."""

from __future__ import annotations

from typing import Any

import torch

from ovi.twin import TwinDiT


def check_shapes(model: TwinDiT, data: Any) -> None:
    """See that latents of every shape that a data module serves divide into a model's patches.

    Args:
        model: may be on the meta device.
        data: the data module.

    Raises:
        OviError: for the first that does not.
    """
    for shapes in getattr(data, "shapes", ()):  # a data module of the user's own need not tell
        for tower, shape in ((model.video, shapes.video), (model.audio, shapes.audio)):
            if 0 not in shape:
                tower.patch_embedding.grid(torch.empty((1, *shape), device="meta"))
