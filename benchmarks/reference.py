"""The original network out of a checkout that the user has, beside ours in one process.

Its package is called ``ovi`` as ours is. It is loaded under another name, and import statements inside its files that
say ``ovi`` mean that name: nothing of ours is touched, imports made later inside its functions resolve as well, and
nothing is written into the checkout.
"""

from __future__ import annotations

import builtins
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import work
from candidate import JOINT, Candidate, settled
from ovi.checkpoint import PUBLISHED_FACTOR, to_reference
from ovi.errors import OviError
from ovi.twin import TwinDiT
from setting import PATCH, Batch, Setting

THEIRS, ALIAS = "ovi", "ovi_reference"

DTYPE_VARIABLE = "OVI_REFERENCE_DTYPE"
"""The published code says bfloat16 in many places. A checkout changed to run in other types can read this variable."""


def fusion_model(checkout: Path) -> Any:
    """The class ``FusionModel`` of ``<checkout>/ovi/modules/fusion.py``.

    Raises:
        OviError: when the checkout has no such file, or something it needs cannot be imported.
    """
    package = checkout / THEIRS
    if not (package / "modules" / "fusion.py").is_file():
        raise OviError(f"{package / 'modules' / 'fusion.py'} is not there: --reference takes the root of a checkout")
    for name in [n for n in sys.modules if _within(n, ALIAS)]:
        del sys.modules[name]
    sys.meta_path[:] = [_Finder(package), *(f for f in sys.meta_path if not isinstance(f, _Finder))]
    try:
        return importlib.import_module(f"{ALIAS}.modules.fusion").FusionModel
    except ImportError as error:
        raise OviError(f"{checkout}: the original cannot be imported ({error}); install what it needs") from error


def original(setting: Setting, batch: Batch, checkout: Path, weights: TwinDiT) -> Candidate:
    """The published FusionModel with the weights of our twin.

    It embeds the timestep and projects the modulation once a token, where ours does once a sample.
    """
    common = {
        "dim": setting.width,
        "ffn_dim": setting.ffn,
        "freq_dim": work.FREQUENCIES,
        "num_heads": setting.heads,
        "num_layers": setting.layers,
        "text_len": setting.text_len,
        "text_dim": setting.text_dim,
        "window_size": (-1, -1),
        "qk_norm": True,
        "cross_attn_norm": True,
        "eps": 1e-6,
    }
    video = {"model_type": "ti2v", "patch_size": PATCH, "in_dim": setting.video_channels}
    audio = {"model_type": "t2a", "patch_size": (1,), "in_dim": setting.audio_channels}
    with _environment(DTYPE_VARIABLE, setting.dtype):
        build = fusion_model(checkout)
    with torch.device(setting.device):
        model = build(
            video_config={**common, **video, "out_dim": setting.video_channels},
            audio_config={
                **common,
                **audio,
                "out_dim": setting.audio_channels,
                "temporal_rope_scaling_factor": PUBLISHED_FACTOR,
            },
        )
    model.load_state_dict(to_reference(weights.state_dict()), strict=True)
    settled(model, setting.torch_dtype)

    def velocities() -> tuple[torch.Tensor, ...]:
        # As its sampling loop calls it: lists of samples without a batch axis, timesteps in 0..1000.
        out = model(
            vid=list(batch.video),
            audio=list(batch.audio),
            t=batch.sigma * 1000,
            vid_context=batch.prompts,
            audio_context=batch.prompts,
            vid_seq_len=setting.video_tokens,
            audio_seq_len=setting.audio_tokens,
        )
        return tuple(torch.stack(list(velocity)) for velocity in out)

    said = "the original; it embeds the timestep once a token, ours once a sample"
    return Candidate(model, velocities, JOINT, said, tuple(work.twin(setting, time_per_token=True)))


def agreement(ours: Candidate, theirs: Candidate, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """How far our outputs are from the original's on the same weights and inputs, by modality.

    Returns:
        For each modality ``max_difference``, ``max_output`` (largest absolute output) and ``relative`` (norm of the
        difference over norm of the output).

    Raises:
        OviError: when the original does not run in this setting, or does not compute the same thing.
    """
    try:
        outputs = theirs.forward()
    except (RuntimeError, AssertionError) as error:
        raise OviError(
            f"the original does not run here in {dtype} ({type(error).__name__}: {error}). As published it needs "
            f"--device cuda --dtype bfloat16 and FlashAttention; a checkout changed for more may read {DTYPE_VARIABLE}"
        ) from error
    most = 1e-3 if dtype in (torch.float32, torch.float64) else 0.1
    found = {}
    for name, a, b in zip(("video", "audio"), ours.forward(), outputs, strict=True):
        a, b = a.double(), b.double()
        relative = float((a - b).norm() / b.norm())
        found[name] = {
            "max_difference": float((a - b).abs().max()),
            "max_output": float(b.abs().max()),
            "relative": relative,
        }
        if not relative < most:
            raise OviError(
                f"our {name} velocity is {relative:.2g} of its norm away from the original's, {most:g} would be "
                f"rounding in {dtype}: the two do not compute the same thing, so their times cannot be compared"
            )
    return found


class _Finder(MetaPathFinder):
    """Finds ALIAS and what lies below it in the folder of their package."""

    def __init__(self, package: Path) -> None:
        self.package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not _within(fullname, ALIAS):
            return None
        place = self.package.joinpath(*fullname.split(".")[1:])
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if file.is_file():
            folders = [str(place)] if place.is_dir() else None
            loader = _Loader(fullname, str(file))
            return spec_from_file_location(fullname, file, loader=loader, submodule_search_locations=folders)
        if not place.is_dir():
            return None
        bare = ModuleSpec(fullname, None, is_package=True)
        bare.submodule_search_locations = [str(place)]
        return bare


class _Loader(SourceFileLoader):
    """Runs a file of theirs with an ``import`` of its own."""

    def exec_module(self, module: ModuleType) -> None:
        # An import statement calls the __import__ of the builtins that its globals name.
        vars(module)["__builtins__"] = {**vars(builtins), "__import__": _import}
        super().exec_module(module)

    def set_data(self, *_: Any, **__: Any) -> None:
        """Keep byte code out of their checkout."""


def _import(name: str, *rest: Any) -> ModuleType:
    level = rest[3] if len(rest) > 3 else 0
    if level == 0 and _within(name, THEIRS):
        name = ALIAS + name.removeprefix(THEIRS)
    return builtins.__import__(name, *rest)


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
