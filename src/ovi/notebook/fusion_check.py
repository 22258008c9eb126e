"""What every fusion must keep, checked on a class of one's own in a second or two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ovi.notebook.tables import html_table, text_table

if TYPE_CHECKING:
    from torch import Tensor

    from ovi.twin import TwinDiT

_TOWER: dict[str, Any] = {"dim": 24, "num_heads": 2, "num_blocks": 2, "ffn_dim": 32, "freq_dim": 16}


@dataclass(frozen=True)
class FusionReport:
    """What was checked: (name, what is wrong or an empty string) each."""

    checks: tuple[tuple[str, str], ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.failures

    @property
    def failures(self) -> dict[str, str]:
        """What is wrong, by the check's name."""
        return {name: wrong for name, wrong in self.checks if wrong}

    def __repr__(self) -> str:
        return text_table(self._rows())

    def _repr_html_(self) -> str:
        return html_table(self._rows())

    def _rows(self) -> list[tuple[str, str]]:
        return [(name, wrong or "holds") for name, wrong in self.checks]


def check_fusion(fusion: Callable[..., Any], **knobs: Any) -> FusionReport:
    """See whether a fusion keeps what the rest of ``ovi`` builds on; the checks of the test suite, in small.

    Args:
        fusion: the class, registered or not; or whatever builds one from (video block, audio block).
        knobs: its keyword arguments.
    """
    made = partial(fusion, **knobs) if knobs else fusion
    found = []
    for name, check in CHECKS.items():
        try:
            wrong = check(made)
        except Exception as error:  # whatever a stranger's class raises is the finding
            wrong = f"{type(error).__name__}: {error}"
        found.append((name, wrong))
    return FusionReport(tuple(found))


def _twin(fusion: Any, *, alignment: str = "seconds", video: Any = None, audio: Any = None, **knobs: Any) -> TwinDiT:
    """A small twin whose heads are awake, and its fusion's zeros too, so that everything shows in the result."""
    import torch

    from ovi.clock import Clock
    from ovi.layout import LatentLayout
    from ovi.patch import LinearPatch, VideoPatch
    from ovi.rope import ROPE_ALIGNMENTS
    from ovi.tower import Tower
    from ovi.twin import build_twin

    layout = LatentLayout(4, 6, 8, 5, Clock(fps=8, video_stride=1, causal_first_frame=False))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_twin(
            layout,
            video=partial(Tower, patch=VideoPatch, **{**_TOWER, **(video or {})}),
            audio=partial(Tower, patch=LinearPatch, **{**_TOWER, **(audio or {})}),
            fusion=fusion,
            rope_alignment=ROPE_ALIGNMENTS[alignment],
            **knobs,
        ).eval()
        for tower in (model.video, model.audio):
            torch.nn.init.normal_(tower.out.head.weight, std=0.3)
        for p in model.fusions.parameters():
            if not p.detach().any():
                torch.nn.init.normal_(p, std=0.3)
    return model


def _without(model: TwinDiT, **sizes: Any) -> TwinDiT:
    """The twin without exchange that has the model's towers."""
    from ovi.fusion import NoFusion

    plain = _twin(NoFusion, **sizes)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("fusions")})
    return plain


def _inputs(batch: int = 2, device: str = "cpu") -> tuple[Any, ...]:
    import torch

    draws = torch.Generator().manual_seed(1)
    video = torch.randn(batch, 4, 4, 4, 4, generator=draws).to(device)
    audio = torch.randn(batch, 9, 6, generator=draws).to(device)
    text = [torch.randn(1 + i % 5, 8, generator=draws).to(device) for i in range(batch)]
    return video, audio, torch.linspace(0.2, 0.9, batch).to(device), text, text


def _run(model: TwinDiT, *given: Any, **options: Any) -> tuple[Tensor, Tensor]:
    import torch

    with torch.no_grad():
        video, audio = model(*(given or _inputs()), **options)
    assert video is not None
    assert audio is not None
    return video, audio


def _largest(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs))


def _off_is_off(fusion: Any) -> str:
    for alignment in ("seconds", "none"):
        model = _twin(fusion, alignment=alignment)
        gap = _largest(_run(model, a2v=0.0, v2a=0.0), _run(_without(model, alignment=alignment)))
        if gap:
            return (
                f"with both gates at 0 the result is {gap:.2g} away from that of `none`; it must be equal, bit for bit"
            )
    return ""


def _something_crosses(fusion: Any) -> str:
    model = _twin(fusion, video={"num_blocks": 1}, audio={"num_blocks": 1})  # one block: no way back
    off, hears, sees = (_run(model, a2v=a, v2a=v) for a, v in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)))
    silent = [
        way
        for way, i, on in (("video hears", 0, hears), ("audio sees", 1, sees))
        if _largest((on[i],), (off[i],)) < 1e-6
    ]
    return f"{' and '.join(silent)} nothing" if silent else ""


def _own_gate(fusion: Any) -> str:
    model = _twin(fusion, video={"num_blocks": 1}, audio={"num_blocks": 1})
    off, hears, sees = (_run(model, a2v=a, v2a=v) for a, v in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)))
    if _largest((hears[1],), (off[1],)):
        return "control.a2v changes the sound: it may only scale what video hears"
    if _largest((sees[0],), (off[0],)):
        return "control.v2a changes the picture: it may only scale what audio sees"
    return ""


def _gates_of_samples(fusion: Any) -> str:
    import torch

    model, gate = _twin(fusion), torch.tensor([1.0, 0.0])
    mixed, on, off = _run(model, a2v=gate, v2a=gate), _run(model), _run(model, a2v=0.0, v2a=0.0)
    expected = tuple(torch.stack([a[0], b[1]]) for a, b in zip(on, off))
    gap = _largest(mixed, expected)
    return f"a gate [B] is not a gate of each sample, {gap:.2g} away: use ovi.stream.apply_gate" if gap > 1e-5 else ""


def _gradients(fusion: Any) -> str:
    model = _twin(fusion)
    video, audio = model(*_inputs())
    assert video is not None
    assert audio is not None
    (video.square().sum() + audio.square().sum()).backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    return f"no gradient reaches {', '.join(dead[:6])}{' and more' if len(dead) > 6 else ''}" if dead else ""


def _alone(fusion: Any) -> str:
    model = _twin(fusion)
    video, audio, sigma, text, _ = _inputs(batch=3)
    together = _run(model, video, audio, sigma, text, text)
    alone = _run(model, video[1:2], audio[1:2], sigma[1:2], text[1:2], text[1:2])
    gap = _largest(tuple(t[1:2] for t in together), alone)
    return f"a sample's result changes by {gap:.2g} with the others in its batch" if gap > 2e-5 else ""


def _padding(fusion: Any) -> str:
    import torch

    model = _twin(fusion)
    video, audio, sigma, text, _ = _inputs()
    mask = torch.arange(9) < torch.tensor([[6], [9]])
    changed = audio.clone()
    changed[0, 6:] = 50.0
    (v, a), (w, b) = (_run(model, video, x, sigma, text, text, audio_mask=mask) for x in (audio, changed))
    gap = _largest((v, a[0, :6]), (w, b[0, :6]))
    return f"what stands in masked audio tokens changes the result by {gap:.2g}: heed a.mask" if gap > 1e-5 else ""


def _unequal(fusion: Any) -> str:
    sizes: dict[str, Any] = {"video": {"dim": 48, "num_heads": 3}, "audio": {"dim": 24, "num_heads": 2}}
    model = _twin(fusion, **sizes)
    gap = _largest(_run(model, a2v=0.0, v2a=0.0), _run(_without(model, **sizes)))
    return f"towers of unequal width: off is {gap:.2g} away from `none`" if gap else ""


def _no_waiting(fusion: Any) -> str:
    model = _twin(fusion).to("meta")
    video, audio = model(*_inputs(device="meta"))
    assert video is not None
    assert audio is not None
    (video.sum() + audio.sum()).backward()
    return ""


def _half(fusion: Any) -> str:
    import torch

    model = _twin(fusion)
    video, audio, sigma, text, _ = _inputs()
    exact = _run(model, video, audio, sigma, text, text)
    half = _run(model.to(torch.bfloat16), video.bfloat16(), audio.bfloat16(), sigma, text, text)
    kinds = {x.dtype for x in half}
    if kinds != {torch.bfloat16}:
        return f"bfloat16 weights give {', '.join(map(str, kinds))}"
    gap = max(float((a - b).norm() / b.norm()) for a, b in zip(half, exact))
    return f"in bfloat16 the result is {gap:.0%} away from float32's" if gap > 0.05 else ""


CHECKS: dict[str, Callable[[Any], str]] = {
    "off is exactly off": _off_is_off,
    "on, something crosses": _something_crosses,
    "each gate rules its own direction": _own_gate,
    "gates of single samples": _gates_of_samples,
    "gradients reach every parameter": _gradients,
    "samples do not see each other": _alone,
    "masked audio tokens change nothing": _padding,
    "towers of unequal width": _unequal,
    "the host never waits for the device": _no_waiting,
    "bfloat16 is near float32": _half,
}
"""What is checked, in this order."""
