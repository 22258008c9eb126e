"""Fusion strategies, one a file; importing the package registers them."""

from ovi.fusion.affinity import AffinityFusion
from ovi.fusion.base import FUSIONS, Fusion
from ovi.fusion.bottleneck import BottleneckFusion
from ovi.fusion.bridge import BridgeFusion, LTX2Fusion, MOVAFusion
from ovi.fusion.film import FiLMFusion
from ovi.fusion.framewise import FramewiseFusion
from ovi.fusion.joint import JointFusion
from ovi.fusion.none import NoFusion
from ovi.fusion.ovi import OviFusion
from ovi.fusion.stitch import StitchFusion

__all__ = [
    "FUSIONS",
    "AffinityFusion",
    "BottleneckFusion",
    "BridgeFusion",
    "FiLMFusion",
    "FramewiseFusion",
    "Fusion",
    "JointFusion",
    "LTX2Fusion",
    "MOVAFusion",
    "NoFusion",
    "OviFusion",
    "StitchFusion",
]
