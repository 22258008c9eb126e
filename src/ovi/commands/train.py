"""``ovi train``: fit a twin on latent shards."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ovi.commands.hydra_app import run
from ovi.errors import OviError

if TYPE_CHECKING:
    from ovi.training.module import TwinModule


def main(argv: list[str]) -> None:
    """Compose ``conf/train.yaml`` and train."""
    run("train", train, argv)


def train(config: DictConfig) -> dict[str, Any]:
    """Train as configured; returns the run's summary, which also lies in ``summary.json`` of its folder.

    Raises:
        OviError: for data, checkpoints or knobs that do not fit, before training starts.
    """
    return fit(config, Path(HydraConfig.get().runtime.output_dir))


def fit(
    config: DictConfig,
    folder: Path,
    *,
    identity: Mapping[str, Any] | None = None,
    callbacks: Sequence[Any] = (),
    replace: bool = False,
) -> dict[str, Any]:
    """Train into a folder.

    Args:
        config: composed from ``conf/train.yaml``.
        folder: of the run.
        identity: what ``run.json`` says of a run of a sweep: label, variant, sweep.
        callbacks: further ones, whatever the configuration says.
        replace: take away what an earlier run left in the folder, once it is sure that this one begins.

    Returns:
        The run's summary; ``pruned`` is in it when a callback that has such an attribute ended the run.

    Raises:
        OviError: for what does not fit, or when another run writes to the folder.
    """
    _quiet()
    identity = {"label": str(config.name), "variant": {}, "sweep": None, **(identity or {})}
    identity |= {"seed": config.seed, "config_hash": hash_of(config)}
    from ovi.commands.budget import apply_budget
    from ovi.commands.calibration import seconds_per_step
    from ovi.commands.record import write_summary, write_versions
    from ovi.training.callbacks.training_time import TrainingTime
    from ovi.twin import num_parameters

    data = instantiate(config.data, _convert_="all")
    resume, taken = _resumed(config, data)
    module = _module(config, data, resuming=resume is not None)
    with written(folder, identity, replace):
        write_versions(folder, config)
        flops = _FlopsOfAStep(config, data)
        apply_budget(
            config,
            lambda: flops.needed() * num_processes(config),
            lambda: seconds_per_step(config, module, folder),
            lambda: getattr(data, "num_train_batches", None),
        )
        _check_goes_on(config, taken, config.trainer.max_steps)
        clock = TrainingTime()
        chosen = [clock, *ordered(instantiate(config.callbacks, _convert_="all"), callbacks)]
        trainer = instantiate(
            config.trainer,
            _convert_="all",
            default_root_dir=str(folder),
            callbacks=chosen,
            logger=[logger for logger in instantiate(config.logger, _convert_="all").values() if logger is not None],
        )
        began = time.perf_counter()
        trainer.fit(module, datamodule=data, ckpt_path=None if resume is None else str(resume))
        summary = {
            "steps": trainer.global_step,
            "seconds": time.perf_counter() - began,
            "train_seconds": clock.seconds,
            "parameters": num_parameters(module.model),
            **flops.of(trainer.global_step * trainer.world_size),
            "seed": identity["seed"],
            "config_hash": identity["config_hash"],
            "metrics": {name: float(value) for name, value in sorted(trainer.callback_metrics.items())},
        }
        pruned = [step for c in callbacks if (step := getattr(c, "pruned", None)) is not None]
        summary |= {"pruned": pruned[0]} if pruned else {}
        if trainer.is_global_zero:
            write_summary(folder, summary)
    return summary


def _resumed(config: DictConfig, data: Any) -> tuple[Path | None, int]:
    """The checkpoint that the run goes on from, and the steps it has taken; (None, 0) for a new one.

    Raises:
        OviError: when it is of other latents, or has taken all the steps already.
    """
    from ovi.commands.budget import read_budget
    from ovi.commands.restore import check_layout, find_checkpoint, read_checkpoint

    if not config.resume:
        return None, 0
    resume = find_checkpoint(config.resume)
    checkpoint = read_checkpoint(resume)
    check_layout(checkpoint["ovi"], data.layout, f"resume={config.resume}")
    taken = int(checkpoint["global_step"])
    budget = read_budget(config)
    if budget is None or budget.kind == "steps":
        _check_goes_on(config, taken, config.trainer.max_steps if budget is None else int(budget.amount))
    return resume, taken


def _module(config: DictConfig, data: Any, *, resuming: bool) -> TwinModule:
    """What is trained, with the weights that it starts from.

    Raises:
        OviError: for weights that do not fit, or an adapter of weights that would be drawn by chance.
    """
    import lightning as L

    from ovi.adapters import ADAPTERS
    from ovi.attention import use_attention
    from ovi.checkpoint import without_storage
    from ovi.commands.initial import Initial, find_initial
    from ovi.commands.latent_shapes import check_shapes
    from ovi.commands.restore import make_record
    from ovi.commands.sample import check_validation
    from ovi.training.module import TwinModule

    check_validation(config)
    # A run that is continued has its weights already; what it once started from may be gone.
    initial = Initial() if resuming else find_initial(config, data.layout)
    adapter = ADAPTERS.spec(OmegaConf.to_container(config.adapter, resolve=True))  # type: ignore[arg-type]
    if initial or (adapter["name"] != "none" and not resuming):
        # Drawing the weights of a large twin takes minutes: what does not fit is found out without them.
        with without_storage():
            skeleton = instantiate(config.model, _convert_="all")(data.layout)
        check_shapes(skeleton, data)
        initial.check(skeleton)
        initial.check_adapter(adapter["name"], skeleton)
    record = make_record(
        config.model, data.layout, data.index.content, config.flow.text_dropout, config.get("codec_paths")
    )
    L.seed_everything(config.seed, workers=True, verbose=False)
    model = instantiate(config.model, _convert_="all")(data.layout)
    check_shapes(model, data)
    initial.load(model)
    instantiate(config.adapter, _convert_="all")(model)
    use_attention(model, instantiate(config.attention, _convert_="all"))
    if config.compile:
        model.compile_layers()
    return TwinModule(
        model,
        record={**record, "adapter": adapter},
        **instantiate(config.flow, _convert_="all"),
        **instantiate(config.optim, _convert_="all"),
    )


def _check_goes_on(config: DictConfig, taken: int, steps: int) -> None:
    # Training would end at once, without a validation: finished, and without a figure.
    if config.resume and 0 < steps <= taken:
        raise OviError(
            f"resume={config.resume} has taken {taken} steps, and this run asks for {steps}: there is nothing to "
            "continue. Raise trainer.max_steps or the budget"
        )


def hash_of(config: DictConfig) -> str:
    """Checksum of all that decides a run's result."""
    from ovi.runs.identity import config_hash

    return config_hash(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]


def num_processes(config: DictConfig) -> int:
    """Processes that a run's trainer has, each of which computes batches of its own for every step."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return int(instantiate(config.trainer, _convert_="all", **quiet).world_size)


class _FlopsOfAStep:
    """Operations of a step in one process: counted once, and no reason to fail where they decide nothing."""

    def __init__(self, config: DictConfig, data: Any) -> None:
        self.config, self.data = config, data
        self._found: float | None = None

    def needed(self) -> float:
        from ovi.commands.step_flops import step_flops

        self._found = step_flops(self.config, self.data) if self._found is None else self._found
        return self._found

    def of(self, steps: int) -> dict[str, float]:
        """What a summary says of them."""
        try:
            return {"flops_per_step": self.needed(), "flops": self.needed() * steps}
        except Exception as error:  # an attention of somebody's that has no meta kernel, say
            warnings.warn(f"operations could not be counted ({type(error).__name__}: {error})", stacklevel=2)
            return {}


@contextmanager
def written(folder: Path, identity: Mapping[str, Any], replace: bool = False) -> Iterator[None]:
    """A run's folder while its main process writes it: locked, with its identity, and with the error if it fails."""
    from lightning.pytorch.utilities import rank_zero_only

    from ovi.commands.record import begin_run, clear_run, write_failure
    from ovi.runs.alive import alive
    from ovi.runs.run import IDENTITY

    if getattr(rank_zero_only, "rank", 0):
        yield
        return
    with alive(folder):
        if replace and (folder / IDENTITY).is_file():  # else what lies there is no run of ours
            clear_run(folder)
        begin_run(folder, identity)
        try:
            yield
        except Exception as error:
            write_failure(folder, error)
            raise


def _quiet() -> None:
    """Keep Lightning's remarks on accelerators, tips and its own deprecations out of the way of the progress bar."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.pytorch.utilities._pytree")


def ordered(callbacks: Mapping[str, Any], further: Sequence[Any] = ()) -> list[Any]:
    """The callbacks that are on, then further ones, weight averaging last.

    It swaps the averaged weights out when validation ends; whatever generates clips at that moment must come before.
    """
    from lightning.pytorch.callbacks import WeightAveraging

    chosen = [callback for callback in (*callbacks.values(), *further) if callback is not None]
    return sorted(chosen, key=lambda callback: isinstance(callback, WeightAveraging))
