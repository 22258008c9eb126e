"""``ovi train``: fit a twin on latent shards."""

from __future__ import annotations

import logging
import time
import warnings
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from ovi.commands.hydra_app import run


def main(argv: list[str]) -> None:
    """Compose ``conf/train.yaml`` and train."""
    run("train", train, argv)


def train(config: DictConfig) -> dict[str, Any]:
    """Train as configured; returns the run's summary, which also lies in ``summary.json`` of its folder.

    Raises:
        OviError: for data, checkpoints or knobs that do not fit, before training starts.
    """
    return fit(config, Path(HydraConfig.get().runtime.output_dir))


def fit(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Train into a folder.

    Args:
        config: composed from ``conf/train.yaml``.
        folder: of the run.
    """
    import lightning as L

    _quiet()
    from ovi.attention import use_attention
    from ovi.checkpoint import without_storage
    from ovi.commands.initial import Initial, find_initial
    from ovi.commands.record import write_summary, write_versions
    from ovi.commands.restore import check_layout, find_checkpoint, make_record, read_checkpoint
    from ovi.training.module import TwinModule
    from ovi.twin import num_parameters

    data = instantiate(config.data, _convert_="all")
    resume = find_checkpoint(config.resume) if config.resume else None
    if resume is not None:
        check_layout(read_checkpoint(resume)["ovi"], data.layout, f"resume={config.resume}")
    # A run that is continued has its weights already; what it once started from may be gone.
    initial = Initial() if resume else find_initial(config, data.layout)
    if initial:
        # Drawing the weights of a large twin takes minutes: what does not fit is found out without them.
        with without_storage():
            skeleton = instantiate(config.model, _convert_="all")(data.layout)
        initial.check(skeleton)

    L.seed_everything(config.seed, workers=True, verbose=False)
    model = instantiate(config.model, _convert_="all")(data.layout)
    initial.load(model)
    use_attention(model, instantiate(config.attention, _convert_="all"))
    if config.compile:
        model.compile_layers()
    module = TwinModule(
        model,
        record=make_record(config.model, data.layout, data.index.content, config.flow.text_dropout),
        **instantiate(config.flow, _convert_="all"),
        **instantiate(config.optim, _convert_="all"),
    )
    folder.mkdir(parents=True, exist_ok=True)
    interval, max_steps = config.trainer.val_check_interval, config.trainer.max_steps
    if isinstance(interval, int) and 0 < max_steps < interval:
        config.trainer.val_check_interval = max_steps
    trainer = instantiate(
        config.trainer,
        _convert_="all",
        default_root_dir=str(folder),
        callbacks=ordered(instantiate(config.callbacks, _convert_="all")),
        logger=[logger for logger in instantiate(config.logger, _convert_="all").values() if logger is not None],
    )
    write_versions(folder, config)
    began = time.perf_counter()
    trainer.fit(module, datamodule=data, ckpt_path=None if resume is None else str(resume))
    summary = {
        "steps": trainer.global_step,
        "seconds": time.perf_counter() - began,
        "parameters": num_parameters(model),
        "metrics": {name: float(value) for name, value in sorted(trainer.callback_metrics.items())},
    }
    if trainer.is_global_zero:
        write_summary(folder, summary)
    return summary


def _quiet() -> None:
    """Keep Lightning's remarks on accelerators, tips and its own deprecations out of the way of the progress bar."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.pytorch.utilities._pytree")


def ordered(callbacks: dict[str, Any]) -> list[Any]:
    """The callbacks that are on, weight averaging last.

    It swaps the averaged weights out when validation ends; whatever generates clips at that moment must come before.
    """
    from lightning.pytorch.callbacks import WeightAveraging

    chosen = [callback for callback in callbacks.values() if callback is not None]
    return sorted(chosen, key=lambda callback: isinstance(callback, WeightAveraging))
