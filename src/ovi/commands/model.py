"""Models from overrides alone, as ``ovi train`` would build them, without data or a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf.errors import OmegaConfBaseException

from ovi.commands.components import load_components, store_components
from ovi.commands.knobs import check_knobs
from ovi.errors import OviError
from ovi.layout import LatentLayout
from ovi.twin import TwinDiT


def model_builder(overrides: Sequence[str]) -> tuple[Callable[[str, LatentLayout], TwinDiT], Any]:
    """How to build a model with any fusion, and its configuration.

    Args:
        overrides: of ``conf/train.yaml``, as on the command line of ``ovi train``.

    Returns:
        (fusion, layout) -> the twin on the default device; and the model's node.

    Raises:
        OviError: when the overrides do not compose.
    """
    load_components()
    store_components()

    def composed(*more: str) -> Any:
        GlobalHydra.instance().clear()
        try:
            with initialize_config_module("ovi.conf", version_base="1.3"):
                config = compose("train", [*overrides, *more])
            check_knobs(config)
            return config.model
        except (HydraException, OmegaConfBaseException) as error:
            raise OviError(f"{' '.join(overrides)}: {str(error).strip()}") from error

    def build(fusion: str, layout: LatentLayout) -> TwinDiT:
        twin: TwinDiT = instantiate(composed(f"model/fusion={fusion}"), _convert_="all")(layout)
        return twin

    return build, composed()
