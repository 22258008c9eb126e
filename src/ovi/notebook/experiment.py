"""An experiment, composed as on the command line and not yet begun."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovi.commands.kernel import in_notebook
from ovi.errors import OviError
from ovi.notebook.latents import Latents
from ovi.notebook.short_errors import ShortErrors
from ovi.notebook.tables import html_table, text_table

if TYPE_CHECKING:
    from ovi.layout import LatentLayout
    from ovi.notebook.trained import Trained
    from ovi.twin import TwinDiT

_MOST_ROWS = 40


class Experiment:
    """What ``ovi train`` would do with the same overrides.

    Args:
        overrides: as on the command line.

    Raises:
        OviError: for overrides that do not compose, knobs that nothing has.
    """

    def __init__(self, *overrides: str) -> None:
        with ShortErrors():
            from ovi.commands.compose import compose, task_config

            self.overrides = overrides
            self._composed = compose("train", overrides)
            self.config = task_config(self._composed)

    @cached_property
    def overridden(self) -> dict[str, tuple[Any, Any]]:
        """Settings that are not the defaults: (value, default) by dotted key; a default that is not there is None."""
        from ovi.commands.compose import flat, task_config

        mine, default = flat(self.config), flat(task_config(self._usual)) | self._knob_defaults()
        # Which entry is chosen is told by ``choices``.
        keys = [key for key in mine if not key.endswith(("._target_", "._partial_"))]
        for key in keys:  # a whole node that is switched off
            if key not in default and any(other.startswith(f"{key}.") for other in default):
                default[key] = "{...}"
        return {key: (mine[key], default.get(key)) for key in keys if key not in default or mine[key] != default[key]}

    @property
    def choices(self) -> dict[str, str]:
        """The entry chosen of every group: ``{"model/fusion": "ovi", ...}``."""
        chosen = self._composed.hydra.runtime.choices
        return {str(group): str(name) for group, name in chosen.items() if name and not str(group).startswith("hydra")}

    def but(self, *overrides: str) -> Experiment:
        """The same with further overrides."""
        return Experiment(*self.overrides, *overrides)

    def build(self, layout: LatentLayout | Latents | str | Path | None = None) -> TwinDiT:
        """The model as training begins with it, on the host; see ``ovi.build``."""
        return build(self, layout=layout)

    def train(self, folder: str | Path | None = None) -> Trained:
        """Train it; see ``ovi.fit``."""
        return fit(self, folder)

    @cached_property
    def _usual(self) -> Any:
        """What is composed without overrides."""
        from ovi.commands.compose import compose

        return compose("train")

    def _knob_defaults(self) -> dict[str, Any]:
        """Knobs of entries that are not chosen by default, as their signatures have them, by dotted key."""
        from ovi.registry import REGISTRIES

        usual = self._usual.hydra.runtime.choices
        of_group = {registry.group: registry for registry in REGISTRIES.values()}
        found: dict[str, Any] = {}
        for group, name in self.choices.items():
            kind, _, package = group.partition("@")
            registry = of_group.get(kind)
            if registry is not None and name in registry and usual.get(group) != name:
                node = registry.node(name)
                found |= {f"{package or kind.replace('/', '.')}.{knob}": value for knob, value in node.items()}
        return found

    def __repr__(self) -> str:
        return text_table(self._rows(), head=("setting", "value", "default"), title=self._title)

    def _repr_html_(self) -> str:
        return html_table(self._rows(), head=("setting", "value", "default"), title=self._title)

    @property
    def _title(self) -> str:
        return f"ovi train {' '.join(self.overrides)}".rstrip()

    def _rows(self) -> list[tuple[Any, ...]]:
        default = {str(k): str(v) for k, v in self._usual.hydra.runtime.choices.items()}
        rows: list[tuple[Any, ...]] = [
            (group, name, default.get(group) if default.get(group) not in (name, None, "None") else "")
            for group, name in sorted(self.choices.items())
            if group in _TOLD or default.get(group) != name
        ]
        settings = [
            (key, value, "" if default is None else default) for key, (value, default) in self.overridden.items()
        ]
        rows += settings[:_MOST_ROWS]
        if len(settings) > _MOST_ROWS:
            rows.append((f"and {len(settings) - _MOST_ROWS} more", "", ""))
        return rows


_TOLD = ("model", "model/fusion", "model/rope_alignment", "flow/timesteps", "optim")


def compose(*overrides: str) -> Experiment:
    """Compose an experiment with the overrides of ``ovi train``, checked as there.

    Args:
        overrides: ``"experiment=demo"``, ``"model/fusion=bridge"``, ``"trainer.max_steps=200"``, ...

    Raises:
        OviError: for overrides that do not compose, knobs that nothing has.
    """
    return Experiment(*overrides)


def build(
    run: Experiment | str = "", *overrides: str, layout: LatentLayout | Latents | str | Path | None = None
) -> TwinDiT:
    """A twin as training would begin with it, on the host, its weights drawn with the experiment's seed.

    Args:
        run: what ``compose`` gave, or an override.
        overrides: further ones.
        layout: of the latents it is for: a LatentLayout, or a set of shards or its folder; None takes ``data.path``.

    Raises:
        OviError: as ``compose`` does, or without any latents to fit.
    """
    import torch

    from ovi.layout import LatentLayout

    if isinstance(run, Experiment):
        chosen = run.but(*overrides) if overrides else run
    else:
        chosen = Experiment(*([run] if run else []), *overrides)
    with ShortErrors():
        from ovi.commands.compose import made_of
        from ovi.data.index import ShardIndex
        from ovi.data.reading.remote import is_remote

        if layout is None:
            path = chosen.config.data.path if "path" in chosen.config.data else None
            if path is None or not (is_remote(path) or Path(path).exists()):
                lies = f"{path}, where nothing is" if path else "not set"
                raise OviError(
                    f"what latents is the model for? data.path is {lies}: give layout=LatentLayout(...) or "
                    "layout=FOLDER, or set data.path"
                )
            layout = path
        if isinstance(layout, Latents):
            layout = layout.layout
        elif not isinstance(layout, LatentLayout):
            layout = ShardIndex.load(layout).layout()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(chosen.config.seed)
            model: TwinDiT = made_of(chosen.config.model, layout)
    return model


def fit(run: Experiment, folder: str | Path | None = None) -> Trained:
    """Train an experiment as ``ovi train`` does.

    Args:
        run: what ``compose`` gave.
        folder: of the run, where a run that lies there is replaced unless it is continued (``resume``); None makes a
            new one, ``runs/<name>/<time>``.

    Returns:
        The trained run; its folder is that of any other.

    Raises:
        OviError: as ``ovi train`` does.
    """
    from ovi.notebook.trained import load

    with ShortErrors():
        from ovi.commands.compose import in_folder
        from ovi.commands.train import fit as fit_into

        place = _new_folder(run) if folder is None else Path(folder)
        with in_folder(run._composed, place) as config:
            if config.callbacks.get("checkpoint") is None:
                raise OviError(
                    "what is trained is loaded from its checkpoint: callbacks.checkpoint cannot be null here"
                )
            if in_notebook() and config.callbacks.get("progress") is not None:
                config.callbacks.progress._target_ = "ovi.training.callbacks.notebook_progress.NotebookProgress"
            fit_into(config, place, replace=not config.resume)
    return load(place)


def _new_folder(run: Experiment) -> Path:
    """Where the command would write at this moment; never where something lies."""
    from ovi.commands.compose import run_folder

    place = run_folder(run._composed)
    names = (place.with_name(f"{place.name}{suffix}") for suffix in ("", *(f"_{n}" for n in range(1, 1000))))
    return next(name for name in names if not name.exists())
