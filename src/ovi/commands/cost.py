"""What each entry of a registry costs inside a twin: parameters, operations, memory, time beside the entry ``none``.

Parameters, operations and memory are counted on the meta device at the model's own size, whatever this machine is.
Times are measured in turns on this machine, where the model is small enough for it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ovi.attention import use_attention
from ovi.clock import Clock
from ovi.errors import OviError
from ovi.layout import LatentLayout
from ovi.registry import Registry
from ovi.twin import TwinDiT, num_parameters

BASELINE = "none"

MOST_FLOPS = 5e11
"""A forward pass of more operations is not measured on a CPU: it would take minutes a round."""


@dataclass(frozen=True)
class Size:
    """Latents of one batch: video [B, C, F, H, W], audio [B, L, C], prompts of ``text_tokens``."""

    def __str__(self) -> str:
        latent = "x".join(map(str, self.latent))
        return (
            f"{self.batch} of {latent} video latents, {self.audio_tokens} audio tokens, prompts of "
            f"{self.text_tokens}, {self.dtype}"
        )

    layout: LatentLayout
    latent: tuple[int, int, int]
    audio_tokens: int
    text_tokens: int
    batch: int = 1
    dtype: str = "float32"


PUBLISHED = Size(LatentLayout(48, 20, 4096, 512, Clock()), (31, 44, 46), 157, 120, dtype="bfloat16")
"""720x720 for 5 s: the area snapped to multiples of 32 px is 704x736."""

DEMO = Size(
    LatentLayout(9, 32, 64, 24, Clock(fps=12, video_stride=1, causal_first_frame=False)), (24, 4, 4), 62, 12, 16
)
"""Latents like those of the demo's clips."""


@dataclass
class Cost:
    """Figures of one entry; ``parameters`` are those of the fusions alone, times None where nothing was measured."""

    parameters: int = 0
    forward_flops: int = 0
    step_flops: int = 0
    activation_bytes: int = 0
    forward_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    baseline_forward_s: list[float] = field(default_factory=list)
    baseline_step_s: list[float] = field(default_factory=list)
    error: str = ""


def size_of(model_config: Any) -> Size:
    """The latents a model is made for: the published ones if it insists on them, else the demo's."""
    return PUBLISHED if model_config.get("expects") else DEMO


def costs(
    registry: Registry,
    build: Callable[[str], TwinDiT],
    size: Size,
    *,
    rounds: int = 5,
    device: str = "cpu",
) -> dict[str, Cost]:
    """Cost of every entry that the model can take.

    Args:
        registry: of fusions.
        build: makes the twin with the named entry, on the default device.
        size: of one batch.
        rounds: times measured of each, in turns; 0 for none.
        device: where times are measured.

    Returns:
        By name; an entry that the towers do not allow has its ``error``.
    """
    found: dict[str, Cost] = {}
    for name in sorted(registry, key=lambda n: n != BASELINE):
        try:
            with torch.device("meta"):
                model = build(name).to(getattr(torch, size.dtype))
        except OviError as error:
            found[name] = Cost(error=str(error))
            continue
        found[name] = _counted(model, size)
    if found[BASELINE].error:
        raise OviError(
            f"costs are taken relative to {BASELINE}, which this model does not take: {found[BASELINE].error}"
        )
    small = found[BASELINE].forward_flops <= MOST_FLOPS or torch.device(device).type != "cpu"
    if rounds and small:
        _measure({n: c for n, c in found.items() if not c.error}, build, size, rounds, device)
    return found


def table(found: dict[str, Cost], size: Size) -> list[dict[str, Any]]:
    """Rows of plain data: the figures, and their ratios to ``none``."""
    base = found[BASELINE]
    rows = []
    for name, cost in found.items():
        row: dict[str, Any] = {"name": name, "size": str(size), **asdict(cost)}
        if not cost.error:
            row["flops_ratio"] = cost.forward_flops / base.forward_flops
            row["activation_ratio"] = cost.activation_bytes / base.activation_bytes
            for key in ("forward_s", "step_s"):
                mine, other = getattr(cost, key), getattr(cost, f"baseline_{key}")
                # Round by round, so that a machine's drift meets both alike.
                row[f"{key[:-2]}_ratio"] = statistics.median(a / b for a, b in zip(mine, other)) if mine else None
        rows.append(row)
    return rows


def _inputs(size: Size, device: str) -> tuple[Any, ...]:
    dtype = getattr(torch, size.dtype)
    draw = {"device": device, "dtype": dtype}
    video = torch.randn(size.batch, size.layout.video_channels, *size.latent, **draw)
    audio = torch.randn(size.batch, size.audio_tokens, size.layout.audio_channels, **draw)
    text = torch.randn(size.batch, size.text_tokens, size.layout.text_dim, **draw)
    sigma = torch.full((size.batch,), 0.5, device=device)
    return video, audio, sigma, text, text


def _loss(model: TwinDiT, inputs: Sequence[Any]) -> Tensor:
    video, audio = model(*inputs)
    assert video is not None
    assert audio is not None
    return video.float().square().mean() + audio.float().square().mean()


def _counted(model: TwinDiT, size: Size) -> Cost:
    from torch.utils.flop_counter import FlopCounterMode

    use_attention(model, _fused)
    inputs = _inputs(size, "meta")
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor  # held, so that no other storage takes its place
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = _loss(model, inputs)
        forward = counter.get_total_flops()
        bytes_kept = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights)
        loss.backward()
    return Cost(num_parameters(model.fusions), forward, counter.get_total_flops(), bytes_kept)


def count_step(model: TwinDiT, size: Size) -> int:
    """Operations of a forward and backward pass of what is trained.

    Args:
        model: on the meta device.
        size: of one batch.
    """
    from torch.utils.flop_counter import FlopCounterMode

    use_attention(model, _fused)
    with FlopCounterMode(display=False) as counter:
        _loss(model, _inputs(size, "meta")).backward()
    return int(counter.get_total_flops())


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention as a fused kernel counts: on meta tensors torch would fall back to one that keeps all scores."""
    if mask is not None:
        mask = (torch.zeros_like(mask, dtype=q.dtype) if mask.dtype == torch.bool else mask.to(q.dtype))[:, None, None]
    result: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)[0]
    return result


def _measure(found: dict[str, Cost], build: Callable[[str], TwinDiT], size: Size, rounds: int, device: str) -> None:
    inputs = _inputs(size, device)

    def timed(run: Callable[[], Any]) -> float:
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        return time.perf_counter() - start

    def forward(model: TwinDiT) -> None:
        with torch.no_grad():
            model(*inputs)

    def step(model: TwinDiT) -> None:
        model.zero_grad(set_to_none=True)
        _loss(model, inputs).backward()

    with torch.device(device):
        base = build(BASELINE).to(getattr(torch, size.dtype))
    # Two models at a time are alive: each entry in turns with the baseline.
    for name, cost in found.items():
        with torch.device(device):
            model = build(name).to(getattr(torch, size.dtype))
        for turn in range(rounds + 1):
            times = [(timed(lambda m=m: forward(m)), timed(lambda m=m: step(m))) for m in (base, model)]  # type: ignore[misc]
            if turn:  # the first round warms up
                cost.forward_s.append(times[1][0])
                cost.step_s.append(times[1][1])
                cost.baseline_forward_s.append(times[0][0])
                cost.baseline_step_s.append(times[0][1])
        base.zero_grad(set_to_none=True)


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
