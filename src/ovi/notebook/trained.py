"""A trained twin that generates clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovi.errors import OviError
from ovi.notebook.clips import Clips
from ovi.notebook.short_errors import ShortErrors
from ovi.notebook.tables import html_table, text_table

if TYPE_CHECKING:
    import pandas as pd

    from ovi.codecs.bundle import Codecs
    from ovi.runs.run import Run
    from ovi.twin import TwinDiT


@dataclass(frozen=True, repr=False)
class Trained:
    """Weights that can generate.

    Attributes:
        model: the twin; averaged weights where the run kept them.
        codecs: between latents and clips.
        record: what a checkpoint says of its model and data.
        step: of training; None where that is not known.
        source: the file or folder it was loaded from.
        run: the run's folder, read; None for weights without one.
    """

    model: TwinDiT
    codecs: Codecs
    record: dict[str, Any]
    step: int | None
    source: Path
    run: Run | None = None

    def sample(
        self,
        prompts: str | Sequence[str],
        *overrides: str,
        seed: int = 0,
        steps: int | None = None,
        size: tuple[int, int, int] | None = None,
        device: str = "auto",
        first_frame: str | None = None,
    ) -> Clips:
        """Generate a clip for every prompt. Each depends on the seed and its number alone, not on the others.

        Args:
            prompts: one, or several.
            overrides: of ``ovi sample``: ``"generation/guidance=cfg"``, ``"generation.num_steps=50"``,
                ``"negative_audio=noise"``, ``"height=480"``. What they leave open is as in the run's validation; a
                ``"set=..."`` takes the place of that.
            seed: of the noise.
            steps: of the solver; None takes the configured number.
            size: (frames, height, width) in pixels; None takes those of the overrides, or of training.
            device: ``auto`` takes an accelerator where there is one.
            first_frame: a picture that every clip starts with.

        Raises:
            OviError: for overrides that do not compose, guidance that the network does not know, sizes that do not fit.
        """
        given = [prompts] if isinstance(prompts, str) else list(prompts)
        if not given:
            raise OviError("sample needs a prompt, or several; got none")
        with ShortErrors():
            from ovi.commands.compose import made_of
            from ovi.commands.sample import check_guidance, generated_clips, sampling_asked

            own = self.run.config.get("generation") if self.run is not None else None
            asked = sampling_asked(overrides, own)
            node = {**asked.generation, "seed": seed, **({} if steps is None else {"num_steps": steps})}
            generator = made_of(node)
            check_guidance(generator, self.record["text_dropout"], asked.negatives, str(self.source))
            trained_on = (self.record[name] for name in ("num_frames", "height", "width"))
            size = size or tuple(want or had for want, had in zip(asked.size, trained_on))  # type: ignore[assignment]
            clips = list(
                generated_clips(
                    self,
                    generator,
                    given,
                    size=size,
                    device=device,
                    negatives=asked.negatives,
                    first_frame=first_frame,
                )
            )
        return Clips(clips, given)

    @property
    def folder(self) -> Path:
        """Of the run.

        Raises:
            OviError: for weights without one.
        """
        return self._run.folder

    @property
    def metrics(self) -> dict[str, float]:
        """The final figures of its training by tag.

        Raises:
            OviError: for weights without a run.
        """
        return self._run.metrics

    def curves(self) -> pd.DataFrame:
        """Learning curves, columns step, tag, value.

        Raises:
            OviError: for weights without a run.
        """
        return self._run.curves()

    @property
    def _run(self) -> Run:
        if self.run is None:
            raise OviError(f"{self.source} is a file of weights: it has no run with figures and curves")
        return self.run

    def __repr__(self) -> str:
        return text_table(self._rows(), title=f"trained twin from {self.source}")

    def _repr_html_(self) -> str:
        return html_table(self._rows(), title=f"trained twin from {self.source}")

    def _rows(self) -> list[tuple[Any, ...]]:
        from ovi.notebook.reprs import twin_table

        size = "{num_frames} frames of {height}x{width}".format(**self.record)
        seconds = self.codecs.clock.duration_s(self.record["num_frames"])
        rows: list[tuple[Any, ...]] = [*twin_table(self.model)[1], ("clips", size, f"{seconds:g} s")]
        if self.step is not None:
            rows.append(("trained", f"{self.step} steps", ""))
        if self.run is not None:
            wanted = ("val/loss", "val/loss_video", "val/loss_audio")
            rows += [(tag, f"{self.run.metrics[tag]:.4f}", "") for tag in wanted if tag in self.run.metrics]
        return rows


def load(path: str | Path, *, codecs_of: Any = None, codec_paths: Mapping[str, str | None] | None = None) -> Trained:
    """Load a run, one of its checkpoints, or published weights.

    Args:
        path: a run's folder, a ``.ckpt`` file of it; or weights in published names, as ``load_reference`` takes them.
        codecs_of: for published weights, which hold no codecs: a set of latents, or its folder, whose codecs and clip
            size are taken.
        codec_paths: where the codecs' weights lie on this machine, ``{"video": ..., "audio": ..., "text":
            ...}``; what is absent lies where it lay.

    Raises:
        OviError: when there is nothing to load, or weights and latents do not fit.
    """
    with ShortErrors():
        from ovi.checkpoint import find_weights, read_weights
        from ovi.commands.components import load_components
        from ovi.commands.restore import restore

        path = Path(path)
        load_components()
        file = find_weights(path)
        if read_weights(file).of_run:
            if codecs_of is not None:
                raise OviError(
                    f"codecs_of={codecs_of}: {path} is of a run, which names its codecs; codec_paths says where their "
                    "weights lie here. Leave codecs_of out"
                )
            restored = restore(file, codec_paths)
            return Trained(restored.model, restored.codecs, restored.record, restored.step, path, _run_of(path))
        return _published(path, codecs_of, codec_paths)


def _published(path: Path, codecs_of: Any, codec_paths: Mapping[str, str | None] | None) -> Trained:
    from ovi.checkpoint import load_reference
    from ovi.notebook.latents import Latents

    if codecs_of is None:
        raise OviError(
            f"{path} holds weights alone, and generating wants codecs: give codecs_of=FOLDER, a set of latents encoded "
            "with the codecs that the weights were trained on"
        )
    latents = codecs_of if isinstance(codecs_of, Latents) else Latents(codecs_of, codec_paths)
    model = load_reference(path).eval()
    layout = latents.layout
    wrong = model.clock.differences(layout.clock)
    for name, have in (("video_channels", model.video), ("audio_channels", model.audio)):
        channels = have.patch_embedding.channels
        if channels != getattr(layout, name):
            wrong.append(f"{name} {channels} against {getattr(layout, name)}")
    if model.video.text_dim != layout.text_dim:
        wrong.append(f"text_dim {model.video.text_dim} against {layout.text_dim}")
    if wrong:
        raise OviError(f"{path} was trained on other latents than {latents.path} holds: {'; '.join(wrong)}")
    index = latents.index
    record = {"text_dropout": 0.1, "num_frames": index.num_frames, "height": index.height, "width": index.width}
    return Trained(model, latents.codecs, {**record, "layout": layout.to_dict()}, None, path)


def _run_of(path: Path) -> Run | None:
    """The run that a checkpoint is of, where its folder is still around it."""
    from ovi.runs.run import load_run

    for folder in (path, path.parent, path.parent.parent):
        if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
            return load_run(folder)
    return None
