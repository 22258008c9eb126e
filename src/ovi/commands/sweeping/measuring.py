"""A trained run, measured again with another way of generating."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig

from ovi.errors import OviError


def measure_run(config: DictConfig, folder: Path, training: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Validate the averaged weights of a training as it would itself at its end, generating as configured.

    Args:
        config: of ``ovi train``, that of the training but for generation.
        folder: for what is measured.
        training: folder of the run whose last checkpoint is measured.
        identity: what ``run.json`` says: label, variant, sweep.

    Returns:
        The summary: that of the training, with these figures.

    Raises:
        OviError: when the guidance needs what the training did without.
    """
    from lightning.pytorch.callbacks import WeightAveraging

    from ovi.attention import use_attention
    from ovi.commands.record import write_summary, write_versions
    from ovi.commands.restore import model_state, read_checkpoint
    from ovi.commands.train import hash_of, ordered, written
    from ovi.runs.run import load_run
    from ovi.training.callbacks.joint_eval import JointEvalCallback
    from ovi.training.module import TwinModule

    data = instantiate(config.data, _convert_="all")
    generator = instantiate(config.generation, _convert_="all")
    if generator.guidance.needs_negative and not config.flow.text_dropout:
        raise OviError("guidance away from no text needs training with flow.text_dropout above 0")
    checkpoint = read_checkpoint(training)
    L.seed_everything(config.seed, workers=True, verbose=False)
    model = instantiate(config.model, _convert_="all")(data.layout)
    model.load_state_dict(model_state(checkpoint))
    use_attention(model, instantiate(config.attention, _convert_="all"))
    flow, optim = (instantiate(node, _convert_="all") for node in (config.flow, config.optim))
    module = TwinModule(model, **flow, **optim)
    identity = {**identity, "seed": config.seed, "config_hash": hash_of(config)}
    with written(folder, identity):
        write_versions(folder, config)
        callbacks = [c for c in ordered(instantiate(config.callbacks, _convert_="all"))]
        callbacks = [c for c in callbacks if not isinstance(c, WeightAveraging)]  # the weights are averaged already
        evaluation = [c for c in callbacks if isinstance(c, JointEvalCallback)]
        trainer = instantiate(
            config.trainer,
            _convert_="all",
            default_root_dir=str(folder),
            callbacks=[_Begin(evaluation, int(checkpoint["global_step"])), *callbacks],
            logger=[logger for logger in instantiate(config.logger, _convert_="all").values() if logger is not None],
            enable_checkpointing=True,
        )
        began = time.perf_counter()
        trainer.validate(module, datamodule=data, verbose=False)
        trained = load_run(training).summary
        summary = {
            **{key: value for key, value in trained.items() if key not in ("metrics", "peak_memory_gb")},
            "seconds": time.perf_counter() - began,
            "config_hash": identity["config_hash"],
            "checkpoint": str(training),
            "metrics": {name: float(value) for name, value in sorted(trainer.callback_metrics.items())},
        }
        write_summary(folder, summary)
    return summary


class _Begin(L.Callback):
    """Has the callbacks that generate begin as in training, and figures carry the step of the checkpoint."""

    def __init__(self, evaluation: list[Any], step: int) -> None:
        self.evaluation, self.step = evaluation, step

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
        progress.total.completed = self.step
        for callback in self.evaluation:
            callback.on_fit_start(trainer, pl_module)
