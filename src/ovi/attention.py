"""Softmax attention over heads, by one of several kernels, and the split of a width into heads.

Every kernel takes ``(q, k, v, mask)`` and means the same: ``softmax(q k / sqrt(d) + mask) v``. A block holds the one it
uses; ``use_attention`` exchanges it in a whole model.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovi.errors import OviError
from ovi.registry import Registry

ATTENTIONS = Registry("attention", group="attention", doc="the kernel that computes attention")


class Attention(Protocol):
    """Softmax attention, scaled by 1/sqrt(d)."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            q: [B, H, Lq, d].
            k: [B, H, Lk, d].
            v: [B, H, Lk, d].
            mask: over keys, [B, Lk]: bool, which may be attended, or float, added to their scores; None for neither.

        Returns:
            [B, H, Lq, d].
        """
        ...


@ATTENTIONS.register("sdpa")
def sdpa() -> Attention:
    """torch's own scaled_dot_product_attention, which chooses among its kernels: runs everywhere, takes masks."""
    return _sdpa


@ATTENTIONS.register("flash")
def flash(*, version: int | None = None) -> Attention:
    """flash-attn's kernels, float16 and bfloat16 on CUDA; a call with a mask, which they do not take, goes to sdpa.

    Args:
        version: 2 (package flash-attn), 3 (its Hopper build, flash_attn_interface) or 4 (flash-attn-4); None takes the
            highest that is installed.

    Raises:
        OviError: when it is not installed; when called, for tensors that are not half precision on CUDA.
    """
    _flash_kernel(version)  # absent: said now, not in the first step
    return functools.partial(_flash, version=version)


@ATTENTIONS.register("flex")
def flex() -> Attention:
    """torch's flex_attention, the mask compiled into the kernel: masked attention at nearly flash's speed on a GPU.

    Raises:
        OviError: when called, for training on the CPU, where torch has no backward pass for it.
    """
    return _flex


@ATTENTIONS.register("auto")
def auto() -> Attention:
    """The highest flash-attn that is installed, where it takes the tensors and no mask is given; else sdpa."""
    return _best if flash_versions() else _sdpa


def use_attention(model: nn.Module, attention: Attention) -> None:
    """Let every block of a model attend by this kernel."""
    for module in model.modules():
        if hasattr(module, "attention"):
            setattr(module, "attention", attention)  # noqa: B010  (its type is the module's own business)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    if mask is not None:
        mask = (mask if mask.dtype == torch.bool else mask.to(q.dtype))[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, version: int | None) -> Tensor:
    if not _flash_takes(q):
        raise OviError(
            f"attention=flash needs float16 or bfloat16 on CUDA, got {q.dtype} on {q.device.type}: "
            "use attention=sdpa, or trainer.precision=bf16-mixed on a GPU"
        )
    return _flash_kernel(version)(q, k, v) if mask is None else _sdpa(q, k, v, mask)


def _best(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return _flash_kernel(None)(q, k, v) if mask is None and _flash_takes(q) else _sdpa(q, k, v, mask)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    on_cpu = q.device.type == "cpu"
    if on_cpu and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise OviError("attention=flex has no backward pass on the CPU: use attention=sdpa to train there")
    # Inside a compiled block it is compiled with the block; on the CPU the plain form needs no compiler.
    kernel = flex_attention if on_cpu or torch.compiler.is_compiling() else _compiled_flex()
    result: Tensor = kernel(q, k, v, score_mod=None if mask is None else _masked_score(mask))
    return result


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _masked_score(mask: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    def allowed(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(mask[b, j], score, -float("inf"))

    def shifted(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + mask[b, j]

    return allowed if mask.dtype == torch.bool else shifted


# Version, module, function; the highest first.
_FLASH = (
    (4, "flash_attn.cute", "flash_attn_func"),
    (3, "flash_attn_interface", "flash_attn_func"),
    (2, "flash_attn", "flash_attn_func"),
)
_EXTRAS = {4: "pip install 'ovi[flash4]'", 3: "build flash-attention's hopper folder", 2: "pip install 'ovi[flash]'"}


@functools.cache
def flash_versions() -> tuple[int, ...]:
    """The versions of flash-attn that are installed, highest first."""
    return tuple(version for version, module, name in _FLASH if _function(module, name) is not None)


@functools.cache
def _flash_kernel(version: int | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    installed = flash_versions()
    if version is None and installed:
        version = installed[0]
    if version not in installed:
        wanted = "flash-attn" if version is None else f"version {version} of flash-attn"
        have = f"installed are {', '.join(map(str, installed))}" if installed else "none is installed"
        how = "; ".join(f"{n}: {text}" for n, text in sorted(_EXTRAS.items()) if version in (None, n))
        raise OviError(f"attention=flash: {wanted} is not here, {have} ({how}); or use attention=sdpa")
    function = next(_function(module, name) for v, module, name in _FLASH if v == version)

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # These kernels keep tokens before heads, which is how our projections lie in memory: nothing is copied.
        result = function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        heads = result[0] if isinstance(result, tuple) else result  # some also give the log of the sums
        return heads.transpose(1, 2)

    return kernel


def _function(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except Exception:  # absent, or built for another torch or driver: not usable either way
        return None


def _flash_takes(q: Tensor) -> bool:
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, L, H*d] -> [B, H, L, d]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[B, H, L, d] -> [B, L, H*d]."""
    return x.transpose(1, 2).flatten(2)
