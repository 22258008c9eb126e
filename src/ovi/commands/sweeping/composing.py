"""Configurations of runs: composed as ``ovi train`` would, and checked before the first run starts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from ovi.checkpoint import without_storage
from ovi.commands.budget import read_budget
from ovi.commands.initial import find_initial
from ovi.commands.knobs import check_knobs
from ovi.commands.latent_shapes import check_shapes
from ovi.commands.sample import check_validation
from ovi.commands.sweeping.arguments import merged
from ovi.commands.train import hash_of

OF_RUNS = "train"
"""The configuration that runs are composed from."""


class Composer:
    """Composes runs that have some overrides in common.

    Args:
        loader: Hydra's, with the search path of the command line.
        common: overrides of every run.
    """

    def __init__(self, loader: Any, common: Sequence[str]) -> None:
        self.loader, self.common = loader, tuple(common)
        self._data: dict[str, Any] = {}

    def overrides(self, own: Sequence[str], seed: int) -> list[str]:
        """All overrides of a run."""
        return merged(self.common, own, [f"seed={seed}"])

    def __call__(self, own: Sequence[str], folder: Path) -> DictConfig:
        """The configuration of a run with seed 0, resolved.

        Args:
            own: what it has beside the common overrides.
            folder: of the run.
        """
        composed = self.loader.load_configuration(OF_RUNS, self.overrides(own, 0), run_mode=RunMode.RUN)
        return self.with_seed(composed, 0, folder)

    def each(self, own: Sequence[str], folders: dict[int, Path]) -> Iterator[tuple[int, DictConfig]]:
        """Configurations of a variant with several seeds."""
        composed = self.loader.load_configuration(OF_RUNS, self.overrides(own, 0), run_mode=RunMode.RUN)
        for seed, folder in folders.items():
            yield seed, self.with_seed(composed, seed, folder)

    @staticmethod
    def with_seed(composed: DictConfig, seed: int, folder: Path) -> DictConfig:
        """A composed configuration with another seed, resolved."""
        with _current(composed, folder):
            plain = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
            with read_write(plain), open_dict(plain):
                plain.seed = seed
            return OmegaConf.create(OmegaConf.to_container(plain, resolve=True))  # type: ignore[return-value]

    def check(self, config: DictConfig) -> None:
        """See that a run could start: its names, knobs, data, model and weights to start from, none of it computed.

        Args:
            config: resolved.

        Raises:
            OviError: for what does not fit.
        """
        from ovi.adapters import ADAPTERS
        from ovi.training.module import TwinModule

        check_knobs(config)
        read_budget(config)
        check_validation(config)
        data = self._data_of(config)
        with without_storage():
            model = instantiate(config.model, _convert_="all")(data.layout)
        check_shapes(model, data)
        initial = find_initial(config, data.layout)
        initial.check(model)
        adapter = ADAPTERS.spec(OmegaConf.to_container(config.adapter))["name"]  # type: ignore[arg-type]
        initial.check_adapter(adapter, model)
        TwinModule(model, **instantiate(config.flow, _convert_="all"), **instantiate(config.optim, _convert_="all"))
        instantiate(config.callbacks, _convert_="all")

    def _data_of(self, config: DictConfig) -> Any:
        node = {**OmegaConf.to_container(config.data), "seed": 0}  # type: ignore[dict-item]
        key = json.dumps(node, sort_keys=True, default=str)
        if key not in self._data:
            self._data[key] = instantiate(config.data, _convert_="all")
        return self._data[key]


@contextmanager
def _current(config: DictConfig, folder: Path) -> Iterator[None]:
    """Have interpolations into Hydra's own settings find those of a run."""
    before = HydraConfig.instance().cfg
    with read_write(config.hydra), open_dict(config.hydra):
        config.hydra.runtime.output_dir = str(folder)
    HydraConfig.instance().set_config(config)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before


__all__ = ["OF_RUNS", "Composer", "hash_of"]
