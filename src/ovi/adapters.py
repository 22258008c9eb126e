"""Small weights trained beside frozen ones: fine-tuning a large twin with little memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ovi.errors import OviError
from ovi.registry import Registry

ADAPTERS = Registry("adapter", group="adapter", doc="small weights trained beside frozen ones, in fine-tuning")

_DOWN, _UP, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer"
"""peft's names: what is adapted keeps its own weights under ``base_layer``."""


@ADAPTERS.register("none")
def no_adapters(model: nn.Module) -> None:
    """Every weight is trained itself."""


@ADAPTERS.register("lora")
def lora(
    model: nn.Module,
    *,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] = ("self_attn", "cross_attn", "fusions"),
) -> None:
    """Each linear layer of the targets gets ``scale * B A`` beside its frozen weights (LoRA, 2106.09685), through peft.

    B starts at zero, so that the model starts as it was. In place; all else is frozen. ``merge_adapters`` ends it.

    Args:
        rank: rows of A, columns of B.
        alpha: numerator of the scale, alpha / rank; None takes the rank, which makes the scale 1.
        dropout: share of A's inputs dropped in training.
        targets: parts of the layers' names: ``self_attn``, ``cross_attn``, ``ffn``, ``fusions``, ``video``, or finer
            ones (``q``); a layer is adapted if its name has one of them.

    Raises:
        OviError: without peft, for numbers that make no sense, for a target that names no linear layer.
    """
    if rank < 1 or not 0 <= dropout < 1 or (alpha is not None and alpha <= 0):
        raise OviError(
            f"adapter.rank from 1, adapter.alpha above 0, adapter.dropout in 0 to below 1; got {rank}, {alpha} and "
            f"{dropout}"
        )
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise OviError(f"adapter=lora needs peft, which is not there ({error}): pip install peft") from error
    if is_adapted(model):
        raise OviError("the model has adapters already: merge_adapters makes them part of its weights")
    linear = {name: set(name.split(".")) for name, module in model.named_modules() if type(module) is nn.Linear}
    parts = set().union(*linear.values())
    unknown = [target for target in targets if target not in parts]
    if unknown or not targets:
        words = sorted(part for part in parts if not part.isdigit())
        raise OviError(
            f"adapter.targets: no linear layer has {', '.join(unknown) or 'nothing'} in its name; there are "
            f"{', '.join(words)}"
        )
    chosen = [name for name, words in linear.items() if words & set(targets)]
    config = LoraConfig(r=rank, lora_alpha=_alpha(rank, alpha), lora_dropout=dropout, target_modules=chosen)  # type: ignore[arg-type]
    model.requires_grad_(False)
    inject_adapter_in_model(config, model)


def is_adapted(model: nn.Module) -> bool:
    """Whether a model has adapters."""
    return any(name.endswith(_BASE) for name, _ in model.named_modules())


def merge_adapters(model: nn.Module) -> nn.Module:
    """Make adapters part of the weights that they stand beside, in place; all weights are trainable again.

    Returns:
        The model.
    """
    for name, module in list(model.named_modules()):
        if name.endswith(_BASE):
            layer = model.get_submodule(name.removesuffix(_BASE))
            layer.merge()  # type: ignore[operator]
            parent, _, last = name.removesuffix(_BASE).rpartition(".")
            setattr(model.get_submodule(parent), last, module)
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model.requires_grad_(True)


def merged_state(state: Mapping[str, Tensor], adapter: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """Weights of an adapted model as those of one without adapters.

    Args:
        state: of a model with or without adapters.
        adapter: spec of what adapted it, ``{"name", "knobs"}``; None for nothing.
    """
    if not any(name.endswith(_UP) for name in state):
        return dict(state)
    knobs = (adapter or {}).get("knobs", {})
    plain = {}
    for name, tensor in state.items():
        if name.endswith((_DOWN, _UP)):
            continue
        layer = name.removesuffix(f"{_BASE}.weight")
        if layer != name:
            down, up = (state[layer + part] for part in (_DOWN, _UP))
            scale = _alpha(len(down), knobs.get("alpha")) / len(down)
            tensor = tensor + scale * (up.to(tensor) @ down.to(tensor))
        plain[name.replace(_BASE, "")] = tensor
    return plain


def save_adapters(model: nn.Module, folder: str | Path) -> Path:
    """Write the adapters alone, as peft does: ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        OviError: for a model without adapters.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    _need_adapters(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config["default"].save_pretrained(str(folder))  # type: ignore[index,union-attr,operator]
    state = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(model).items()}
    file = folder / "adapter_model.safetensors"
    temporary = file.with_suffix(".partial")
    save_file(state, temporary, metadata={"format": "pt"})
    return temporary.replace(file)


def load_adapters(model: nn.Module, folder: str | Path) -> None:
    """Adapt a model with what ``save_adapters`` wrote, in place.

    Raises:
        OviError: when there is nothing to load, or it does not fit the model.
    """
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    file = Path(folder) / "adapter_model.safetensors"
    try:
        state, config = load_file(file), LoraConfig.from_pretrained(str(folder))
    except Exception as error:  # peft asks the hub for what it does not find, with errors of its own
        raise OviError(f"{folder}: holds no adapters that can be read ({type(error).__name__}: {error})") from error
    layers = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    adapted = {name.rpartition(".lora_")[0] for name in state}
    missing = sorted(adapted - layers)
    if missing:
        raise OviError(f"{folder}: its adapters belong to another model: this one has no linear layer {missing[0]}")
    config.target_modules = adapted  # whole names: what peft wrote are endings
    model.requires_grad_(False)
    inject_adapter_in_model(config, model)
    try:
        set_peft_model_state_dict(model, state)
    except RuntimeError as error:
        merge_adapters(model)  # they are still zero
        raise OviError(f"{folder}: its adapters do not fit this model: {error}") from error


def _alpha(rank: int, alpha: float | None) -> float:
    return float(rank if alpha is None else alpha)


def _need_adapters(model: nn.Module) -> None:
    if not is_adapted(model):
        raise OviError(
            "the model has no adapters: adapter=lora in training, or ovi.adapters.lora(model), gives it some"
        )
