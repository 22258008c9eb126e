"""ovi: a training and ablation bench for twin-backbone joint audio-video diffusion.

``import ovi`` loads nothing else; what stands in ``__all__``, and every module, is loaded when it is first asked for:
``ovi.compose``, ``ovi.FUSIONS``, ``ovi.checkpoint``.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ovi.errors import OviError
    from ovi.fusion import FUSIONS, Fusion
    from ovi.notebook.clips import Clips, show
    from ovi.notebook.experiment import Experiment, build, compose, fit
    from ovi.notebook.fusion_check import check_fusion
    from ovi.notebook.latents import Latents, encode, latents
    from ovi.notebook.pictures import picture
    from ovi.notebook.sweep import sweep
    from ovi.notebook.trained import Trained, load

_NAMES = {
    "ADAPTERS": "ovi.adapters",
    "ATTENTIONS": "ovi.attention",
    "AUDIO_CODECS": "ovi.codecs",
    "AUDIO_FEATURES": "ovi.metrics.features.base",
    "CAPTIONERS": "ovi.data.stages.captioner",
    "CLAP_BACKENDS": "ovi.metrics.clap.backend",
    "Clips": "ovi.notebook.clips",
    "Clock": "ovi.clock",
    "DENSITIES": "ovi.flow",
    "Experiment": "ovi.notebook.experiment",
    "FUSIONS": "ovi.fusion",
    "Fusion": "ovi.fusion",
    "GUIDANCES": "ovi.guidance",
    "LAUNCHERS": "ovi.data.launchers.base",
    "LatentLayout": "ovi.layout",
    "Latents": "ovi.notebook.latents",
    "METRICS": "ovi.metrics.clip_metric",
    "OviError": "ovi.errors",
    "PATCHES": "ovi.patch",
    "RECOGNISERS": "ovi.metrics.recognisers",
    "RECOMPUTES": "ovi.recompute",
    "ROPE_ALIGNMENTS": "ovi.rope",
    "ROPE_SCALINGS": "ovi.rope_scaling",
    "SAMPLERS": "ovi.sampling",
    "SOURCES": "ovi.data.sources",
    "STAGES": "ovi.data.stages.base",
    "SYNC_ESTIMATORS": "ovi.metrics.sync_estimators",
    "TEXT_ENCODERS": "ovi.codecs",
    "TIMESTEPS": "ovi.flow",
    "TOWERS": "ovi.tower",
    "Trained": "ovi.notebook.trained",
    "VIDEO_CODECS": "ovi.codecs",
    "VIDEO_FEATURES": "ovi.metrics.features.base",
    "build": "ovi.notebook.experiment",
    "check_fusion": "ovi.notebook.fusion_check",
    "compose": "ovi.notebook.experiment",
    "encode": "ovi.notebook.latents",
    "fit": "ovi.notebook.experiment",
    "latents": "ovi.notebook.latents",
    "load": "ovi.notebook.trained",
    "picture": "ovi.notebook.pictures",
    "show": "ovi.notebook.clips",
    "sweep": "ovi.notebook.sweep",
}
"""What ``ovi.NAME`` is, and the module that has it."""

__all__ = [
    "FUSIONS",
    "Clips",
    "Experiment",
    "Fusion",
    "Latents",
    "OviError",
    "Trained",
    "build",
    "check_fusion",
    "compose",
    "encode",
    "fit",
    "latents",
    "load",
    "picture",
    "show",
    "sweep",
]


def __getattr__(name: str) -> Any:
    module = _NAMES.get(name)
    if module is None:
        if name.startswith("_") or importlib.util.find_spec(f"ovi.{name}") is None:
            raise AttributeError(f"module 'ovi' has no attribute {name!r}", name=name, obj=sys.modules[__name__])
        return importlib.import_module(f"ovi.{name}")
    if name.isupper():
        # A registry is of use only with its entries in it, and they stand in modules of their own.
        importlib.import_module("ovi.commands.components").load_components(name)
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*_NAMES, *(n for n in globals() if n.startswith("__"))})


def _tell_ipython() -> None:
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:
        importlib.import_module("ovi.notebook.reprs").register(shell)


_tell_ipython()
