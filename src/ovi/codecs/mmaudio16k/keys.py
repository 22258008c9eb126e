"""MMAudio's original checkpoints (v1-16.pth, best_netG.pt) to what diffusers' networks hold.

Sizes are read off the tensors, so that small models of the same form load too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.linalg import vector_norm

LN10 = math.log(10)
"""The published mel is log10 of magnitudes, the library's is ln."""


def vae_from_original(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Constructor arguments of ``MMAudioVAE`` and tensors of its ``vae``, from raw weights.

    Magnitude-preserving layers (Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion
    models", section 2.3) normalise their weights when they run; the library's expect that done.

    Raises:
        KeyError: when a tensor that tells a size is not there.
    """
    hidden = state["encoder.conv_in.weight"].shape[0]
    config = {
        "mel_bins": state["data_mean"].shape[1],
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
        "hidden_channels": hidden,
        "channel_multipliers": tuple(
            state[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] // hidden
            for level in range(_count(state, r"encoder\.down\.(\d+)\."))
        ),
        "layers_per_block": _count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        "sample_rate": 16000,
        "n_fft": 1024,
        "hop_length": 256,
        "scaling_factor": 1.0,
    }
    tensors = {}
    for name, tensor in state.items():
        if name.startswith("mel_converter."):  # computed, never loaded
            continue
        # By name: data_mean and data_std have three axes as well.
        if name.endswith(".weight"):
            tensor = _normalised(tensor)
        elif name in ("data_mean", "data_std"):
            tensor = tensor * LN10
        tensors[name] = tensor
    return config, tensors


def vocoder_from_original(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments and tensors of ``vocoder16k``, from pairs of weight_g and weight_v.

    Raises:
        KeyError: when a tensor that tells a size is not there.
    """
    stages = _count(state, r"ups\.(\d+)\.")
    blocks = _count(state, r"resblocks\.(\d+)\.") // max(1, stages)
    kernels = tuple(state[f"ups.{stage}.0.weight_v"].shape[2] for stage in range(stages))
    config = {
        "num_mels": state["conv_pre.weight_v"].shape[1],
        "upsample_initial_channel": state["conv_pre.weight_v"].shape[0],
        "upsample_rates": tuple(kernel // 2 for kernel in kernels),
        "upsample_kernel_sizes": kernels,
        "resblock_kernel_sizes": tuple(state[f"resblocks.{n}.convs1.0.weight_v"].shape[2] for n in range(blocks)),
        "resblock_dilation_sizes": ((1, 3, 5),) * blocks,
    }
    tensors = {}
    for name, tensor in state.items():
        if name.endswith(".weight_v"):
            stem = name.removesuffix("_v")
            direction = tensor.double()
            # Over all but the first axis, transposed convolutions included, whose first axis is the input.
            norm = vector_norm(direction, dim=tuple(range(1, tensor.ndim)), keepdim=True)
            tensors[stem] = (direction / norm * state[f"{stem}_g"]).to(tensor.dtype)
        elif not name.endswith(".weight_g"):
            tensors[name] = tensor
    return config, tensors


def _normalised(weight: Tensor) -> Tensor:
    root = math.sqrt(weight[0].numel())
    norm = vector_norm(weight.double(), dim=tuple(range(1, weight.ndim)), keepdim=True)
    return (weight.double() / (1e-4 + norm / root) / root).to(weight.dtype)


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the highest number that the pattern's group finds at the start of a name."""
    found = (re.match(pattern, name) for name in state)
    return 1 + max((int(match[1]) for match in found if match), default=-1)
