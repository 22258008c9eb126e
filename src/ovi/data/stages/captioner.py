"""Captions written by a model, for clips that have none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ovi.data.caption_format import CaptionFormatError, parse_caption
from ovi.data.media import Clip
from ovi.data.stages.base import STAGES, Candidate, Filter, Rejected
from ovi.errors import OviError
from ovi.registry import Registry

CAPTIONERS = Registry("captioner", group="captioner", doc="models that write captions for clips")


class Captioner(ABC):
    """Writes a caption."""

    @abstractmethod
    def caption(self, clip: Clip) -> str:
        """Caption of a clip, in Ovi's format as far as the captioner knows speech and sound; empty for none."""


@STAGES.register("captioner")
class WriteCaptions(Filter):
    """Has a captioner write the captions that are missing; those that break Ovi's format are rejected.

    Figures: ``captioned``, 1 where the caption was written here.

    Args:
        captioner: writes them.
        replace_existing: whether clips that have a caption get another.
    """

    name = "captioner"
    needs = frozenset({"video"})
    level = "clip"

    def __init__(self, captioner: Captioner, *, replace_existing: bool = False) -> None:
        self.captioner, self.replace_existing = captioner, replace_existing

    def judge(self, candidate: Candidate) -> Candidate | Rejected:
        if candidate.caption.strip() and not self.replace_existing:
            return candidate.with_figures({"captioned": 0})
        candidate = candidate.decoded()
        assert candidate.clip is not None
        text = self.captioner.caption(candidate.clip).strip()
        candidate = candidate.with_figures({"captioned": 1})
        if not text:
            return self.reject(candidate, "no_caption", f"{candidate.path}: the captioner wrote nothing")
        try:
            parse_caption(text)
        except CaptionFormatError as error:
            message = f"{candidate.path}: the captioner wrote {text!r:.200}, {error}"
            return self.reject(candidate, f"caption_{error.reason}", message)
        return replace(candidate, caption=text)


@CAPTIONERS.register("transformers")
class TransformersCaptioner(Captioner):
    """An image-and-text-to-text model of transformers, from a local folder; it sees pictures and hears nothing.

    Greedy, so the same clip gets the same caption. Models with a chat template get the pictures and the prompt as one
    turn of a user; others as their processor takes them.

    Args:
        path: folder of the model and its processor.
        prompt: what it is asked.
        num_pictures: shown to it, spread evenly over the clip; models of one picture need 1.
        max_new_tokens: most tokens of a caption.
        dtype: of the weights: float32, bfloat16 or float16.
        device: where it runs.
    """

    def __init__(
        self,
        *,
        path: str,
        prompt: str = "Describe what happens in this video.",
        num_pictures: int = 4,
        max_new_tokens: int = 200,
        dtype: str = "float32",
        device: str = "cpu",
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        folder = Path(path).expanduser()
        if not (folder / "config.json").is_file():
            raise OviError(f"captioner.path={path}: is no folder of a transformers model (config.json is missing)")
        types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if dtype not in types:
            raise OviError(f"captioner.dtype must be one of {', '.join(types)}, got {dtype!r}")
        if num_pictures < 1 or max_new_tokens < 1:
            raise OviError("captioner.num_pictures and captioner.max_new_tokens must be at least 1")
        try:
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, dtype=types[dtype]
            )
            network, loading = loaded
            self.processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise OviError(
                f"captioner.path={path}: cannot be loaded as an image-text-to-text model ({error})"
            ) from error
        missing = sorted(loading["missing_keys"])
        if missing:
            raise OviError(f"captioner.path={path}: {len(missing)} weights are missing, the first {missing[0]}")
        self.network: Any = network.to(device).eval().requires_grad_(False)
        self.prompt, self.num_pictures, self.max_new_tokens = prompt, num_pictures, max_new_tokens
        self.path = path
        self._placed: dict[str, Any] = {"dtype": dtype, "device": device}

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process goes where the weights are, not the weights."""
        knobs: dict[str, Any] = {"path": self.path, "prompt": self.prompt, "num_pictures": self.num_pictures}
        return partial(type(self), **knobs, **self._placed, max_new_tokens=self.max_new_tokens), ()

    def caption(self, clip: Clip) -> str:
        places = [int((n + 0.5) / self.num_pictures * len(clip.frames)) for n in range(self.num_pictures)]
        inputs = self._inputs([clip.frames[n] for n in places]).to(self.network.device)
        for name, value in inputs.items():
            if torch.is_tensor(value) and value.is_floating_point():
                inputs[name] = value.to(self.network.dtype)
        with torch.inference_mode():
            tokens = self.network.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1)
        asked = inputs.get("input_ids")
        # Decoders repeat what they were asked; encoder-decoders do not.
        if asked is not None and tokens.shape[1] >= asked.shape[1]:
            head = tokens[:, : asked.shape[1]]
            tokens = tokens[:, asked.shape[1] :] if torch.equal(head, asked) else tokens
        return self.processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()

    def _inputs(self, pictures: list[np.ndarray]) -> Any:
        if getattr(self.processor, "chat_template", None):
            content: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
            turn = [{"role": "user", "content": [*content, {"type": "text", "text": self.prompt}]}]
            return self.processor.apply_chat_template(
                turn, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        shown = pictures[0] if len(pictures) == 1 else pictures
        return self.processor(images=shown, text=self.prompt, return_tensors="pt")
