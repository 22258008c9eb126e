"""Speech recognisers behind a registry: sound in, words out, always the same words for the same sound."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ovi.errors import OviError
from ovi.metrics.features.weights import file_digest
from ovi.registry import Registry

RECOGNISERS = Registry("recogniser", group="recogniser", doc="speech recognisers that write down what is said")

_WHISPER = (
    "a folder in the format of transformers, as openai/whisper-large-v3 on a model hub is: config.json, "
    "generation_config.json, model.safetensors, preprocessor_config.json and the tokenizer's files"
)
_PROBE = "the quick brown fox"


class Recogniser(nn.Module, ABC):
    """Writes down what is said in a clip.

    A metric keeps it as a part of itself, so ``metric.to(device)`` moves it. It computes without gradients and in
    float32 whatever autocast says, and draws nothing.

    Attributes:
        name: part of the metric's tag; says which weights.
        digest: hex checksum of whatever decides its words.
        sample_rate: in Hz, at which sound must come; the metric resamples.
        spellings: words it spells in several ways, each with the one to count by.
    """

    name: str
    digest: str
    sample_rate: int = 16000
    spellings: Mapping[str, str] = {}

    def train(self, mode: bool = True) -> Recogniser:
        """Stays in evaluation."""
        return super().train(False)

    def __call__(self, waveform: Tensor) -> str:
        """What is said in a waveform float32 [N] in -1..1."""
        device = next((p.device for p in self.parameters()), waveform.device)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return str(super().__call__(waveform.to(device)))

    @abstractmethod
    def forward(self, waveform: Tensor) -> str:
        """What is said in a waveform [N], as it would be written."""


@RECOGNISERS.register("whisper")
class WhisperRecogniser(Recogniser):
    """Whisper by transformers, from a local folder (Radford et al. 2212.04356): greedy, one pass a 30 s window.

    No fall-back to higher temperatures, which would draw; clips over 30 s go through Whisper's own windows by time
    stamps.

    Args:
        path: folder with the weights, in the format of transformers; nothing is fetched.
        language: spoken language as Whisper names it (en, fr, ...); None lets it find out. Models that know English
            alone take no notice.
        label: what the tag calls it; None takes the folder's name.

    Raises:
        OviError: when the folder lacks something, or its tokenizer cannot write.
    """

    def __init__(self, *, path: str | None = None, language: str | None = None, label: str | None = None) -> None:
        super().__init__()
        if path is None:
            raise OviError(f"recogniser.path is not set: it needs {_WHISPER}")
        folder = Path(path).expanduser()
        missing = [n for n in ("config.json", "preprocessor_config.json") if not (folder / n).is_file()]
        if not folder.is_dir() or missing:
            what = f"it has no {missing[0]}" if folder.is_dir() else "there is no such folder"
            raise OviError(f"recogniser.path={path}: {what}. It needs {_WHISPER}")
        from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer

        try:
            self.features = WhisperFeatureExtractor.from_pretrained(folder, local_files_only=True)
            self.tokenizer = WhisperTokenizer.from_pretrained(folder, local_files_only=True)
            loaded: Any = WhisperForConditionalGeneration.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
            )
        except (OSError, ValueError, KeyError) as error:
            raise OviError(f"recogniser.path={path}: cannot be loaded ({error}). It needs {_WHISPER}") from error
        network, report = loaded
        # The output projection is the embedding again and may be left out of a file; nothing else may.
        absent = sorted(set(report["missing_keys"]) - {"proj_out.weight"})
        if absent:
            raise OviError(f"recogniser.path={path}: its weights lack {absent[0]} and {len(absent) - 1} more")
        written = self.tokenizer.decode(self.tokenizer.encode(_PROBE, add_special_tokens=False)).strip()
        if written != _PROBE:  # without its files transformers hands out an empty tokenizer, and no word is ever right
            raise OviError(
                f"recogniser.path={path}: its tokenizer ({len(self.tokenizer)} entries) writes {written!r} for "
                f"{_PROBE!r}: the tokenizer's files are missing or broken. It needs {_WHISPER}"
            )
        network.requires_grad_(False)
        self.network = network.eval()
        self.language = language
        self.sample_rate = int(self.features.sampling_rate)
        self.spellings = getattr(self.tokenizer, "english_spelling_normalizer", None) or {}
        called = re.sub(r"[^0-9a-z]+", "_", (label or folder.resolve().name).lower()).strip("_")
        self.name = called if called.startswith("whisper") else f"whisper_{called}"
        self.digest = _folder_digest(folder)

    def forward(self, waveform: Tensor) -> str:
        """What Whisper writes, without time stamps and marks of its own."""
        window = self.features.n_samples
        long = len(waveform) > window
        found = self.features(
            waveform.cpu().numpy(),
            sampling_rate=self.sample_rate,
            return_tensors="pt",
            truncation=not long,
            padding="longest" if long else "max_length",
            return_attention_mask=True,
        )
        spoken: dict[str, Any] = {}
        if getattr(self.network.generation_config, "is_multilingual", False):
            spoken = {"language": self.language, "task": "transcribe"}
        tokens = self.network.generate(
            found.input_features.to(self.network.device),
            attention_mask=found.attention_mask.to(self.network.device),
            do_sample=False,
            num_beams=1,
            temperature=0.0,
            return_timestamps=long,
            **spoken,
        )
        return str(self.tokenizer.decode(tokens[0], skip_special_tokens=True)).strip()


def _folder_digest(folder: Path) -> str:
    """Of the names and contents of all weights, settings and tokenizer files."""
    files = sorted(f for f in folder.iterdir() if f.suffix in (".json", ".txt", ".safetensors", ".bin"))
    lines = [f"{file.name} {file_digest(file)}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
