"""The 16 kHz audio VAE and vocoder of MMAudio, which Ovi's audio tower was trained on."""

from ovi.codecs.mmaudio16k.codec import MMAudio16k, save_diffusers

__all__ = ["MMAudio16k", "save_diffusers"]
