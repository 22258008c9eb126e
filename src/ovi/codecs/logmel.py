"""An audio codec without weights: log-mel spectra in, least squares and Griffin-Lim out.

A token stacks the spectra of ``frames_per_token`` short frames. Frame i is centred on the middle of its own hop, so a
token's content lies at the token's own time and nowhere else: sound and picture meet without a group delay.
"""

from __future__ import annotations

import math
import warnings

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from ovi.codecs.base import AUDIO_CODECS, AudioCodec
from ovi.errors import OviError


@AUDIO_CODECS.register("logmel")
class LogMel(AudioCodec):
    """Stacked log-mel spectra; back by non-negative least squares and fast Griffin-Lim; no weights, lossy.

    Latent channels are ordered frame within the token, then mel band; there are ``frames_per_token * mel_bins``.

    Args:
        sample_rate: in Hz.
        stride: samples per token.
        frames_per_token: spectra per token; their hop is ``stride / frames_per_token`` samples.
        mel_bins: bands of the mel scale (HTK), from ``min_hz`` to half the sample rate.
        n_fft: samples under the Hann window of a spectrum. Shorter keeps onsets, longer keeps pitch.
        min_hz: lower edge of the lowest band.
        floor: added before the logarithm; 1 is a sine at full scale, so 1e-3 drops what lies 60 dB below.
        inverse_steps: iterations of the non-negative least squares from bands to frequencies.
        phase_steps: iterations of Griffin-Lim.
        momentum: of fast Griffin-Lim, 0 is the plain one.

    Raises:
        OviError: when the numbers do not fit each other.
    """

    incidental_knobs = frozenset({"inverse_steps", "phase_steps", "momentum"})  # of decoding alone

    window: Tensor
    bank: Tensor
    lobes: Tensor

    def __init__(
        self,
        *,
        sample_rate: int = 16000,
        stride: int = 512,
        frames_per_token: int = 2,
        mel_bins: int = 32,
        n_fft: int = 512,
        min_hz: float = 40.0,
        floor: float = 1e-3,
        inverse_steps: int = 60,
        phase_steps: int = 32,
        momentum: float = 0.9,
    ) -> None:
        if min(sample_rate, stride, frames_per_token, mel_bins) < 1:
            raise OviError("logmel: sample_rate, stride, frames_per_token and mel_bins must be at least 1")
        if stride % frames_per_token or (stride // frames_per_token) % 2:
            raise OviError(
                f"logmel: a token of {stride} samples does not divide into {frames_per_token} frames of an even number "
                f"of samples: change stride or frames_per_token"
            )
        hop = stride // frames_per_token
        if n_fft % 2 or n_fft < 2 * hop:
            raise OviError(f"logmel: n_fft must be even and at least twice the hop of {hop} samples, got {n_fft}")
        if not 0 <= min_hz < sample_rate / 2 or floor <= 0:
            raise OviError(f"logmel: need 0 <= min_hz < {sample_rate / 2:g} and floor > 0, got {min_hz} and {floor}")
        super().__init__(frames_per_token * mel_bins, sample_rate, stride)
        self.frames_per_token, self.mel_bins, self.hop, self.n_fft = frames_per_token, mel_bins, hop, n_fft
        self.floor, self.inverse_steps, self.phase_steps, self.momentum = floor, inverse_steps, phase_steps, momentum
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        self.register_buffer("bank", mel_bank(n_fft, mel_bins, min_hz, sample_rate), persistent=False)
        self.register_buffer("lobes", hann_lobes(n_fft // 2 + 1), persistent=False)

    def encode_raw(self, signal: Tensor) -> Tensor:
        """Waveforms [B, N] to log magnitudes [B, N // stride, C]; samples past the last whole token still count.

        Raises:
            OviError: for another number of axes, or less than one token of sound.
        """
        if signal.ndim != 2:
            raise OviError(f"logmel: expected mono waveforms [B, N], got {list(signal.shape)}")
        num_tokens = signal.shape[1] // self.stride
        if not num_tokens:
            raise OviError(f"logmel: {signal.shape[1]} samples are less than one token of {self.stride}: longer clips")
        magnitudes = self._spectrum(signal, num_tokens * self.frames_per_token).abs()
        logs = torch.log(magnitudes.transpose(1, 2) @ self.bank.T + self.floor)
        return rearrange(logs, "b (l f) m -> b l (f m)", f=self.frames_per_token)

    def decode_raw(self, latent: Tensor) -> Tensor:
        """Log magnitudes [B, L, C] to waveforms [B, L * stride]; deterministic.

        Raises:
            OviError: for another number of channels.
        """
        if latent.ndim != 3 or latent.shape[2] != self.latent_channels:
            raise OviError(f"logmel: expected latents [B, L, {self.latent_channels}], got {list(latent.shape)}")
        logs = rearrange(latent, "b l (f m) -> b (l f) m", f=self.frames_per_token)
        # A sampled latent can exceed anything a waveform in -1..1 gives; e^1 is 9 dB above a sine at full scale.
        bands = (logs.clamp(max=1.0).exp() - self.floor).clamp_min(0)
        return self._phase(self._unmel(bands), latent.shape[1] * self.stride)

    def _unmel(self, bands: Tensor) -> Tensor:
        """Bands [B, I, mel] to magnitudes [B, n_fft/2 + 1, I]: multiplicative least squares (Lee and Seung 2001).

        Solved for sines, not for single frequencies: a sine spreads over its neighbours as the Hann window says, and
        knowing that halves the error in pitch.
        """
        atoms = self.bank @ self.lobes
        target = bands @ atoms
        gram = atoms.T @ atoms
        sines = target
        for _ in range(self.inverse_steps):
            sines = sines * target / (sines @ gram).clamp_min(1e-12)
        return (sines @ self.lobes).transpose(1, 2)

    def _phase(self, magnitudes: Tensor, num_samples: int) -> Tensor:
        """Waveform whose spectra come closest to the magnitudes: fast Griffin-Lim (Perraudin et al. 2013)."""
        generator = torch.Generator().manual_seed(0)
        # The same start for every clip of a batch, so that a clip decodes alike alone and in company.
        angles = torch.rand(magnitudes.shape[1:], generator=generator).to(magnitudes) * (2 * math.pi)
        spectrum = torch.polar(magnitudes, angles.expand_as(magnitudes).contiguous())
        previous = torch.zeros_like(spectrum)
        num_frames = magnitudes.shape[2]
        for _ in range(self.phase_steps):
            rebuilt = self._spectrum(self._waveform(spectrum, num_samples), num_frames)
            ahead = rebuilt + self.momentum * (rebuilt - previous)
            previous = rebuilt
            spectrum = magnitudes * ahead / ahead.abs().clamp_min(1e-12)
        return self._waveform(spectrum, num_samples)

    def _spectrum(self, signal: Tensor, num_frames: int) -> Tensor:
        """Complex spectra [B, n_fft/2 + 1, num_frames], frame i centred at (i + 1/2) * hop; a full-scale sine is 1."""
        total = (num_frames - 1) * self.hop + self.n_fft
        before = (self.n_fft - self.hop) // 2
        padded = functional.pad(signal, (before, max(0, total - before - signal.shape[1])))[:, :total]
        spectrum = torch.stft(
            padded, self.n_fft, self.hop, window=self.window, center=False, onesided=True, return_complex=True
        )
        return spectrum * (2 / self.window.sum())

    def _waveform(self, spectrum: Tensor, num_samples: int) -> Tensor:
        """Least-squares inverse of ``_spectrum`` (Griffin and Lim 1984, eq. 6), cut to ``num_samples``."""
        frames = torch.fft.irfft(spectrum.transpose(1, 2) * (self.window.sum() / 2), n=self.n_fft) * self.window
        total = (spectrum.shape[2] - 1) * self.hop + self.n_fft
        signal = self._overlap(frames, total)
        weight = self._overlap(self.window.square().expand(1, spectrum.shape[2], -1), total)
        before = (self.n_fft - self.hop) // 2
        return (signal / weight.clamp_min(1e-8))[:, before : before + num_samples]

    def _overlap(self, frames: Tensor, total: int) -> Tensor:
        columns = frames.transpose(1, 2)
        added = functional.fold(columns, (1, total), (1, self.n_fft), stride=(1, self.hop))
        return added[:, 0, 0]


def hann_lobes(num_frequencies: int) -> Tensor:
    """Magnitudes [n, n] that a sine at each frequency of the transform shows under a Hann window: 1/2, 1, 1/2."""
    ones = torch.ones(num_frequencies)
    return torch.diag(ones) + 0.5 * torch.diag(ones[1:], 1) + 0.5 * torch.diag(ones[1:], -1)


def mel_bank(n_fft: int, mel_bins: int, min_hz: float, sample_rate: int) -> Tensor:
    """Triangular mel filters [mel_bins, n_fft/2 + 1], each summing to 1, float32.

    Raises:
        OviError: when a band is so narrow that it falls between two frequencies of the transform.
    """
    from transformers.audio_utils import mel_filter_bank

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of the empty band that we raise for
        filters = mel_filter_bank(n_fft // 2 + 1, mel_bins, min_hz, sample_rate / 2, sample_rate, mel_scale="htk")
    bank = torch.from_numpy(filters.T.copy())
    if (bank.sum(1) <= 0).any():
        raise OviError(
            f"logmel: of {mel_bins} bands from {min_hz:g} Hz some are narrower than the {sample_rate / n_fft:g} Hz "
            f"that n_fft {n_fft} resolves: fewer mel_bins, a higher min_hz or a longer n_fft"
        )
    return (bank / bank.sum(1, keepdim=True)).float()
