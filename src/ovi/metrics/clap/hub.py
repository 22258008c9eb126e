"""CLAP by transformers, from a local folder in the hub's layout."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ovi.errors import OviError
from ovi.metrics.clap.backend import CLAP_BACKENDS, NUM_TOKENS, SAMPLE_RATE, WINDOW, ClapBackend, check_tokenizer
from ovi.metrics.features.weights import file_digest

_ORIGIN = "for instance https://huggingface.co/laion/larger_clap_general or laion/clap-htsat-unfused"
_NEEDED = ("config.json", "preprocessor_config.json|processor_config.json", "tokenizer.json|vocab.json")
_WEIGHTS = "model.safetensors|model.safetensors.index.json|pytorch_model.bin|pytorch_model.bin.index.json"
_SUFFIXES = {".safetensors", ".bin", ".json", ".txt"}


@CLAP_BACKENDS.register("transformers")
class TransformersClap(ClapBackend):
    """CLAP of transformers, from a folder with weights, configuration, preprocessor and tokenizer.

    Its tag is ``clap_<name of the folder>``, or of the repository when the folder is a snapshot in the hub's cache.

    Args:
        path: the folder.

    Raises:
        OviError: when something is missing there, weights for parts of the network included, or its tokenizer is a
            stub.
    """

    def __init__(self, *, path: str | None = None) -> None:
        super().__init__()
        folder = _folder(path)
        from transformers import ClapModel, ClapProcessor

        processor = ClapProcessor.from_pretrained(str(folder), local_files_only=True)
        with torch.random.fork_rng(devices=[]):
            loaded: Any = ClapModel.from_pretrained(
                str(folder), local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
        model, loading = loaded
        absent = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in loading[kind])
        if absent:  # transformers draws these at random and only warns
            raise OviError(f"path={folder}: has no weights for {len(absent)} tensors of the network: {absent[:3]}")
        self.extractor, self.tokenizer, self.clap = processor.feature_extractor, processor.tokenizer, model
        heard_as = (self.extractor.sampling_rate, self.extractor.nb_max_samples)
        if heard_as != (SAMPLE_RATE, WINDOW):
            raise OviError(
                f"path={folder}: its preprocessor wants {heard_as[1]} samples at {heard_as[0]} Hz, expected {WINDOW} "
                f"at {SAMPLE_RATE}"
            )
        _check(self.tokenizer, model.config.text_config.vocab_size, folder)
        self.embed_dim = int(model.config.projection_dim)
        self.name = _name(folder.resolve() if folder.name in ("", ".", "..") else folder)
        self.digest = _digest(folder)
        self.freeze()

    def texts(self, captions: list[str]) -> Tensor:
        tokens = self.tokenizer(captions, padding=True, truncation=True, max_length=NUM_TOKENS, return_tensors="pt")
        tokens = {key: tokens[key].to(self.device) for key in ("input_ids", "attention_mask")}
        return self.clap.get_text_features(**tokens).pooler_output

    def window(self, waveform: Tensor) -> Tensor:
        seen = self.extractor(waveform.cpu().numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt").to(self.device)
        features = seen["input_features"].to(torch.float32)
        return self.clap.get_audio_features(input_features=features, is_longer=seen["is_longer"]).pooler_output[0]

    def count_tokens(self, caption: str) -> int:
        return len(self.tokenizer(caption)["input_ids"])


def _folder(given: str | None) -> Path:
    wanted = f"a folder of a CLAP network in the hub's layout ({_ORIGIN})"
    if given is None:
        raise OviError(f"path is not set: the backend transformers needs {wanted}")
    folder = Path(given).expanduser()
    missing = [n for n in (*_NEEDED, _WEIGHTS) if not any((folder / name).is_file() for name in n.split("|"))]
    if missing:
        which = "; no ".join(names.replace("|", " or ") for names in missing)
        raise OviError(f"path={given}: has no {which}. The backend transformers needs {wanted}")
    return folder


def _check(tokenizer: Any, vocab_size: int, folder: Path) -> None:
    if len(tokenizer) > vocab_size:
        raise OviError(
            f"path={folder}: its tokenizer has {len(tokenizer)} entries, its network reads {vocab_size}: they do not "
            "belong together"
        )
    check_tokenizer(tokenizer, set(tokenizer.all_special_ids), f"path={folder}")


def _name(folder: Path) -> str:
    if folder.parent.name == "snapshots":  # models--OWNER--NAME/snapshots/REVISION
        return folder.parent.parent.name.split("--")[-1]
    return folder.name


def _digest(folder: Path) -> str:
    """Of all files that weights, configuration and tokenizer may come from, by name."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix in _SUFFIXES)
    lines = [f"{file.name} {file_digest(file)}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
