"""What a training run starts from instead of chance: the weights of a whole twin, or those of towers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from lightning.pytorch.utilities import rank_zero_warn
from omegaconf import DictConfig, OmegaConf

from ovi.checkpoint import (
    PUBLISHED_FACTOR,
    WHOLE,
    Weights,
    check_towers,
    check_twin,
    differences,
    find_weights,
    load_towers,
    load_twin,
    read_weights,
    rope_factor,
    stored_clock,
    stored_config,
    wanted_towers,
)
from ovi.clock import Clock
from ovi.commands.restore import RECORD, check_layout, read_checkpoint
from ovi.errors import OviError
from ovi.layout import LatentLayout
from ovi.twin import TwinDiT


@dataclass(frozen=True)
class Initial:
    """Weights to start from, opened but not read.

    Args:
        whole: of a twin with its fusion (``init_from``).
        towers: checkpoints with the towers to take of each, None for all there are (``init_towers``).
    """

    whole: Weights | None = None
    towers: tuple[tuple[Weights, tuple[str, ...] | None], ...] = ()

    def __bool__(self) -> bool:
        return self.whole is not None or bool(self.towers)

    def check(self, model: TwinDiT) -> None:
        """See that everything fits a model, which may be on the meta device; warn where it learnt other positions.

        Raises:
            OviError: listing what does not fit.
        """
        if self.whole is not None:
            check_twin(model, self.whole)
            _compare_positions(model, self.whole, WHOLE)
        for weights, modalities in self.towers:
            check_towers(model, weights, modalities=modalities)
            _compare_positions(model, weights, wanted_towers(weights, modalities))

    def drawn(self, model: TwinDiT) -> list[str]:
        """The parts of a model whose weights these are not, and which would be drawn by chance."""
        if self.whole is not None:
            return []
        given = {modality for weights, modalities in self.towers for modality in wanted_towers(weights, modalities)}
        parts = {"video": model.video, "audio": model.audio, "fusions": model.fusions}
        return [name for name, part in parts.items() if name not in given and any(True for _ in part.parameters())]

    def check_adapter(self, name: str, model: TwinDiT) -> None:
        """See that an adapter trains beside weights that have learnt something: those beside it are frozen.

        Raises:
            OviError: for one beside weights that would be drawn by chance, naming their parts.
        """
        if name != "none" and (drawn := self.drawn(model)):
            raise OviError(
                f"adapter={name} trains small weights beside frozen ones, and those of {', '.join(drawn)} would be "
                "drawn by chance: set init_from, or init_towers for both towers of a twin without weights in its "
                "fusion, or adapter=none"
            )

    def load(self, model: TwinDiT) -> None:
        """Copy the weights into a model."""
        if self.whole is not None:
            load_twin(model, self.whole)
        for weights, modalities in self.towers:
            load_towers(model, weights, modalities=modalities)


def find_initial(config: DictConfig, layout: LatentLayout) -> Initial:
    """What ``init_from`` and ``init_towers`` name.

    Args:
        config: of ``ovi train``.
        layout: of the latents to train on.

    Raises:
        OviError: when both are given, a checkpoint cannot be read, or it was trained on other latents.
    """
    if config.init_from and config.init_towers:
        raise OviError("init_from takes a whole twin's weights, init_towers those of towers alone: give one of them")
    if config.init_from:
        return Initial(whole=_opened(config.init_from, layout, "init_from"))
    asked = (
        OmegaConf.to_container(config.init_towers) if OmegaConf.is_config(config.init_towers) else config.init_towers
    )
    if not asked:
        return Initial()
    if isinstance(asked, Mapping):
        each = {str(modality): path for modality, path in asked.items() if path}
        return Initial(
            towers=tuple((_opened(path, layout, f"init_towers.{m}"), (m,)) for m, path in each.items()),
        )
    return Initial(towers=((_opened(asked, layout, "init_towers"), None),))


def _opened(path: object, layout: LatentLayout, knob: str) -> Weights:
    if not isinstance(path, str):
        raise OviError(f"{knob} must be a path, or {{video: PATH, audio: PATH}} for init_towers; got {path!r}")
    file = find_weights(path)
    weights = read_weights(file)
    if weights.of_run:
        check_layout(read_checkpoint(file)[RECORD], layout, f"{knob}={path}")
        return weights
    clock = stored_clock(weights)
    wrong = [] if clock is None else Clock(**clock).differences(layout.clock)
    if wrong:
        raise OviError(
            f"{knob}={path} was trained on latents of another clock than data.path holds: {'; '.join(wrong)}. "
            "Encode the data with the codecs and fps it was trained with"
        )
    return weights


def _compare_positions(model: TwinDiT, weights: Weights, parts: Collection[str]) -> None:
    """A change of clock is an experiment, or an oversight: say it."""
    if weights.of_run:
        return
    found = differences(model, parts)
    factor = rope_factor(model)
    learnt = float(stored_config(weights, "audio").get("temporal_rope_scaling_factor", PUBLISHED_FACTOR))
    if not found and "audio" in parts and factor != learnt:
        found = [f"audio token j lies at {factor:g} * j: train with model.rope_alignment.factor={learnt:g}"]
    if found:
        rank_zero_warn(
            f"{weights.origin} was trained with other positions or masks than this model has: {'; '.join(found)}"
        )
