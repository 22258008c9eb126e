"""Synthetic clips whose truth is known: balls bounce on a floor and every impact sounds.

Motion is closed-form (parabolas joined at impacts, speed times restitution at each), so picture impacts, sound onsets,
pitch, colour and count are known exactly. Nothing in the picture but the fall tells when the sound must come: a model
that syncs these clips has learnt to.
"""

from ovi.data.synthetic.clips import SyntheticClip, synthetic_clip, write_synthetic
from ovi.data.synthetic.draw import BALL_COLOURS, PITCH_BANDS, sample_scene
from ovi.data.synthetic.render import render
from ovi.data.synthetic.scene import Ball, Scene
from ovi.data.synthetic.words import caption, truth

__all__ = [
    "BALL_COLOURS",
    "PITCH_BANDS",
    "Ball",
    "Scene",
    "SyntheticClip",
    "caption",
    "render",
    "sample_scene",
    "synthetic_clip",
    "truth",
    "write_synthetic",
]
