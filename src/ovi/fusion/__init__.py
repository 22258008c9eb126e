"""Fusion strategies, one a file; importing the package registers them."""

from ovi.fusion.base import FUSIONS, Fusion
from ovi.fusion.none import NoFusion
from ovi.fusion.ovi import OviFusion

__all__ = ["FUSIONS", "Fusion", "NoFusion", "OviFusion"]
