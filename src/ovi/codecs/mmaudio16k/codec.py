"""Waveforms at 16 kHz to the latents of Ovi's audio tower, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ovi.codecs.base import AUDIO_CODECS, AudioCodec
from ovi.codecs.mmaudio16k.keys import LN10, vae_from_original, vocoder_from_original
from ovi.codecs.mmaudio16k.vocoder import vocoder16k
from ovi.codecs.published import (
    PublishedLatents,
    find_dtype,
    load_strictly,
    read_pickle,
    read_safetensors,
    safetensors_files,
    weights_folder,
)
from ovi.errors import OviError

REPO = "hkchengrex/MMAudio"
VAE, VOCODER = "v1-16.pth", "best_netG.pt"
STEM = "diffusion_pytorch_model"
FORM = {"sample_rate": 16000, "n_fft": 1024, "hop_length": 256}


@AUDIO_CODECS.register("mmaudio16k")
class MMAudio16k(PublishedLatents, AudioCodec):
    """MMAudio's VAE and vocoder for 16 kHz by their published weights: 20 channels for 512 samples.

    A latent is the posterior's mean as it comes: the model that Ovi publishes was trained on it without scaling. The
    vocoder gives 512 samples a token, so a clip whose length is no multiple of them ends in up to 32 ms of silence.

    Args:
        path: folder with v1-16.pth and best_netG.pt (itself, or in ext_weights), or with the folders vae and vocoder
            that ``save_diffusers`` writes; or ``owner/name`` of a hub repository with the same, which is then
            downloaded (hkchengrex/MMAudio).
        dtype: type the networks compute in: float32, bfloat16 or float16; spectra are always float32.
        batch_size: clips per pass; memory grows with it.

    Raises:
        OviError: for missing or unfit files, or weights of another model.
    """

    incidental_knobs = frozenset({"path", "dtype", "batch_size"})

    def __init__(self, *, path: str, dtype: str = "float32", batch_size: int = 8) -> None:
        compute = find_dtype("mmaudio16k", dtype)
        if batch_size < 1:
            raise OviError(f"mmaudio16k: batch_size must be at least 1, got {batch_size}")
        patterns = [f"ext_weights/{VAE}", f"ext_weights/{VOCODER}", "vae/*", "vocoder/*"]
        expected = f"{VAE} and {VOCODER}"
        folder = weights_folder("mmaudio16k", path, repo=REPO, patterns=patterns, expected=expected)
        load = _load_diffusers if (folder / "vae" / "config.json").is_file() else _load_original
        vae, vocoder, files = load(folder, compute)
        for name, value in FORM.items():
            if getattr(vae.config, name) != value:
                raise OviError(
                    f"mmaudio16k: {folder} is a model of {name}={getattr(vae.config, name)}, expected {value}: take "
                    f"{expected} of {REPO}"
                )
        samples = math.prod(vocoder.config.upsample_rates)
        if samples != vae.config.hop_length or vocoder.config.num_mels != vae.config.mel_bins:
            raise OviError(
                f"mmaudio16k: the vocoder in {folder} makes {samples} samples of {vocoder.config.num_mels} bands, the "
                f"VAE gives {vae.config.mel_bins} bands for {vae.config.hop_length}: take {expected} of {REPO}"
            )
        AudioCodec.__init__(self, vae.config.latent_channels, FORM["sample_rate"], 2 * FORM["hop_length"])
        # Spectra and their statistics stay float32: log magnitudes span more than bfloat16 resolves.
        vae.vae.encoder.to(compute)
        vae.vae.decoder.to(compute)
        self.vae, self.vocoder = vae, vocoder
        self.weight_files, self.dtype, self.batch_size = files, compute, batch_size
        self.fitted = True

    def encode_raw(self, signal: Tensor) -> Tensor:
        """Waveforms [B, N] in -1..1 to posterior means [B, N // 512, C], float32; what exceeds the range is clipped.

        Raises:
            OviError: for another number of axes, or less than one token of sound.
        """
        if signal.ndim != 2:
            raise OviError(f"mmaudio16k: expected mono waveforms [B, N], got {list(signal.shape)}")
        if signal.shape[1] < self.stride:
            raise OviError(
                f"mmaudio16k: {signal.shape[1]} samples are less than one token of {self.stride}: longer clips"
            )
        return torch.cat([self._encode(part) for part in signal.float().split(self.batch_size)])

    def decode_raw(self, latent: Tensor) -> Tensor:
        """Latents [B, L, C] to waveforms [B, L * 512] in -1..1, float32.

        Raises:
            OviError: for another number of channels.
        """
        if latent.ndim != 3 or latent.shape[2] != self.latent_channels:
            raise OviError(f"mmaudio16k: expected latents [B, L, {self.latent_channels}], got {list(latent.shape)}")
        mels = (self.decode_mel(part) for part in latent.split(self.batch_size))
        return torch.cat([self.vocoder(mel.to(self.dtype)).sample[:, 0].float() for mel in mels])

    def mel(self, signal: Tensor) -> Tensor:
        """Waveforms [B, N] to log10 mel spectra [B, bands, N // 256]."""
        return self.vae.mel_converter(signal) / LN10

    def decode_mel(self, latent: Tensor) -> Tensor:
        """Latents [B, L, C] to log10 mel spectra [B, bands, 2 L], float32: what the vocoder takes."""
        network = self.vae.vae
        standard = network.decoder(latent.transpose(1, 2).to(self.dtype)).float()
        return (standard * network.data_std + network.data_mean) / LN10

    def _encode(self, signal: Tensor) -> Tensor:
        network = self.vae.vae
        standard = (self.vae.mel_converter(signal) - network.data_mean) / network.data_std
        mean = network.encoder(standard.to(self.dtype)).chunk(2, dim=1)[0]
        return mean.transpose(1, 2).float()


def save_diffusers(codec: MMAudio16k, folder: str | Path) -> None:
    """Write a codec's networks as the diffusers folders vae and vocoder, which load without unpickling or folding.

    Raises:
        OviError: when the codec computes in less than float32.
    """
    if codec.dtype != torch.float32:
        raise OviError(f"mmaudio16k: to be saved it must be loaded with dtype=float32, not {codec.dtype}")
    codec.vae.save_pretrained(Path(folder) / "vae")
    codec.vocoder.save_pretrained(Path(folder) / "vocoder")


def _load_original(folder: Path, dtype: torch.dtype) -> tuple[Any, Any, tuple[Path, ...]]:
    inner = folder / "ext_weights"
    root = inner if (inner / VAE).is_file() else folder
    files = (root / VAE, root / VOCODER)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise OviError(
            f"mmaudio16k: {folder} lacks {' and '.join(missing)}, and has no vae/config.json either: set path to a "
            f"folder with {VAE} and {VOCODER} (from {REPO}, folder ext_weights)"
        )
    raw = read_pickle("mmaudio16k", files[1])
    if "generator" not in raw:
        raise OviError(f"mmaudio16k: {files[1]} has no 'generator' in it but {', '.join(list(raw)[:3])}: check path")
    try:
        vae = vae_from_original(read_pickle("mmaudio16k", files[0]))
        vocoder = vocoder_from_original(raw["generator"])
    except KeyError as error:
        raise OviError(f"mmaudio16k: {root} holds other models: there is no tensor {error}; check path") from error
    return _vae(*vae, source=files[0]), _vocoder(*vocoder, source=files[1], dtype=dtype), files


def _load_diffusers(folder: Path, dtype: torch.dtype) -> tuple[Any, Any, tuple[Path, ...]]:
    parts = []
    for name in ("vae", "vocoder"):
        files = safetensors_files("mmaudio16k", folder / name, STEM, repo=f"what save_diffusers writes of {REPO}")
        config = json.loads((folder / name / "config.json").read_text())
        known = {key: value for key, value in config.items() if not key.startswith("_")}
        parts.append((known, read_safetensors("mmaudio16k", files), files))
    (vae_config, vae, vae_files), (vocoder_config, vocoder, vocoder_files) = parts
    inner = {name.removeprefix("vae."): t for name, t in vae.items() if not name.startswith("mel_converter.")}
    return (
        _vae(vae_config, inner, source=folder / "vae"),
        _vocoder(vocoder_config, vocoder, source=folder / "vocoder", dtype=dtype),
        vae_files + vocoder_files,
    )


def _vae(config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, source: Path) -> Any:
    try:
        from diffusers import MMAudioVAE
        from diffusers.models.autoencoders.autoencoder_mmaudio import MMAudioMelSpectrogram
    except ImportError as error:
        raise OviError(
            f"mmaudio16k needs a diffusers that has MMAudioVAE: pip install 'diffusers>=0.42' ({error})"
        ) from error
    with torch.device("meta"):
        vae: Any = MMAudioVAE(**config)
    made = vae.config
    vae.mel_converter = MMAudioMelSpectrogram(made.sample_rate, made.n_fft, made.mel_bins, made.hop_length)
    load_strictly("mmaudio16k", vae.vae, tensors, source)
    return vae.eval()


def _vocoder(config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, source: Path, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        vocoder = vocoder16k(**config)
    load_strictly("mmaudio16k", vocoder, tensors, source, dtype)
    return vocoder
