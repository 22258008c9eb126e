"""Operations that keep nothing but their input for the backward pass: norms with what follows them, GELU with a matrix.

Written plainly, the norm's result, its product with the scale, each half of a rotated pair and the activation all stay
alive until the backward pass. Here they are computed again there, from the input, in a few passes over memory. When
compiling, the plain formulas are better: the compiler fuses and recomputes by itself. They can be differentiated once;
what needs more (gradient penalties, forward mode) must compile the blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ovi.attention import split_heads
from ovi.rope import Rotation, rotate


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, segments: tuple[int, ...], eps: float) -> Tensor:
    """``LayerNorm(x) * (1 + scale) + shift``, the norm without affine, one shift and scale per segment.

    Args:
        x: [B, L, D].
        shift: [B, S, D].
        scale: [B, S, D].
        segments: token counts of the S segments, summing to L.
        eps: of the norm.
    """
    if torch.compiler.is_compiling():
        return modulate(F.layer_norm(x, x.shape[-1:], eps=eps), shift, scale, segments)
    result: Tensor = _ModulatedNorm.apply(x, shift, scale, segments, eps)
    return result


def modulate(x: Tensor, shift: Tensor, scale: Tensor, segments: tuple[int, ...]) -> Tensor:
    """``x * (1 + scale) + shift`` with one shift and scale per segment: x [B, L, D], the others [B, S, D]."""
    if len(segments) == 1:
        return torch.addcmul(shift, x, 1 + scale)
    parts = x.split(segments, dim=1)
    return torch.cat([torch.addcmul(shift[:, i : i + 1], p, 1 + scale[:, i : i + 1]) for i, p in enumerate(parts)], 1)


def normed_heads(x: Tensor, weight: Tensor, num_heads: int, eps: float, rotation: Rotation | None = None) -> Tensor:
    """RMSNorm over the whole width, split into heads, each then turned by its position where a rotation is given.

    Args:
        x: [B, L, H*d].
        weight: of the norm, [H*d].
        num_heads: H.
        eps: of the norm.
        rotation: as ``ovi.rope.rotate`` takes it, of L tokens; None leaves the heads as they are.

    Returns:
        [B, H, L, d].
    """
    if torch.compiler.is_compiling():
        heads = split_heads(F.rms_norm(x, weight.shape, weight, eps).to(x.dtype), num_heads)
        return heads if rotation is None else rotate(heads, rotation)
    result: Tensor = _NormedHeads.apply(x, weight, rotation, num_heads, eps)
    return result


def gelu_linear(x: Tensor, linear: nn.Module) -> Tensor:
    """``linear(GELU(x))``, GELU in its tanh form.

    Args:
        x: [..., D_in].
        linear: a Linear of D_in inputs, or what a fine-tuning method put in its place; that, and a Linear with hooks,
            is called as it is.
    """
    hooked = linear._forward_hooks or linear._forward_pre_hooks
    if torch.compiler.is_compiling() or type(linear) is not nn.Linear or hooked:
        result: Tensor = linear(F.gelu(x, approximate="tanh"))
    else:
        result = _GeluLinear.apply(x, linear.weight, linear.bias)
    return result


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x, approximate="tanh"), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x = for_weight = for_bias = None
        rows = gradient.flatten(0, -2)
        if ctx.needs_input_grad[0]:
            inner = gradient @ weight.to(gradient.dtype)
            for_x = torch.ops.aten.gelu_backward(inner, x.to(inner.dtype), approximate="tanh").to(x.dtype)
        if ctx.needs_input_grad[1]:
            activated = F.gelu(x, approximate="tanh").flatten(0, -2).to(rows.dtype)
            for_weight = (rows.t() @ activated).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            for_bias = rows.sum(0)
        return for_x, for_weight, for_bias


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, segments: tuple[int, ...], eps: float) -> Tensor:
        normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        ctx.save_for_backward(x, scale, mean, rstd)
        ctx.segments, ctx.types = segments, (shift.dtype, scale.dtype)
        return modulate(normed, shift, scale, segments).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, mean, rstd = ctx.saved_tensors
        normed = (x - mean).mul_(rstd).to(gradient.dtype)
        for_scale = _segment_sums(normed.mul_(gradient), ctx.segments).to(ctx.types[1])
        for_shift = _segment_sums(gradient, ctx.segments).to(ctx.types[0])
        scaled = torch.empty_like(gradient)
        for i, (g, out) in enumerate(zip(*(t.split(ctx.segments, 1) for t in (gradient, scaled)))):
            torch.mul(g, (1 + scale[:, i : i + 1]).to(g.dtype), out=out)
        for_x = torch.ops.aten.native_layer_norm_backward(
            scaled.to(x.dtype), x, x.shape[-1:], mean, rstd, None, None, (True, False, False)
        )[0]
        return for_x, for_shift, for_scale, None, None


class _NormedHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rotation: Rotation | None, num_heads: int, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, rotation)
        ctx.num_heads, ctx.eps = num_heads, eps
        # Autocast would have norms return float32, which attention kernels do not take beside half-precision values.
        heads = split_heads(F.rms_norm(x, weight.shape, weight.to(x.dtype), eps).to(x.dtype), num_heads)
        return heads if rotation is None else rotate(heads, rotation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rotation = ctx.saved_tensors
        if rotation is not None:
            gradient = rotate(gradient, rotation, back=True)
        # In float32 at least: sums over the width and over all tokens. Never the caller's own gradient, written below.
        wide = torch.promote_types(x.dtype, torch.float32)
        own = rotation is not None or gradient.dtype != wide
        g = gradient.transpose(1, 2).flatten(2).to(wide)
        normed = x.to(wide, copy=True)
        rrms = torch.linalg.vector_norm(normed, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(ctx.eps).rsqrt_()
        normed.mul_(rrms)
        for_weight = None
        if ctx.needs_input_grad[1]:
            for_weight = torch.linalg.vecdot(g.flatten(0, 1), normed.flatten(0, 1), dim=0).to(weight.dtype)
        g = g.mul_(weight) if own else g * weight
        along = torch.linalg.vecdot(g, normed).div_(x.shape[-1]).unsqueeze(-1)
        for_x = g.sub_(normed.mul_(along)).mul_(rrms)
        return for_x.to(x.dtype), for_weight, None, None, None


def _segment_sums(x: Tensor, segments: tuple[int, ...]) -> Tensor:
    return torch.cat([part.sum(1, keepdim=True) for part in x.split(segments, 1)], 1)
