"""The text encoder of Wan2.2 and Ovi, from its published weights."""

from __future__ import annotations

import html
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ovi.codecs.base import TEXT_ENCODERS, TextEncoder
from ovi.codecs.published import (
    files_sha256,
    find_dtype,
    first_line,
    safetensors_files,
    same_weights,
    weights_folder,
)
from ovi.errors import OviError

REPO = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")


@TEXT_ENCODERS.register("umt5")
class UMT5(TextEncoder):
    """Encoder of umT5-xxl by its published weights: last hidden states of up to 512 tokens, 4096 wide.

    Prompts are cleaned as the published pipeline does it (ftfy, HTML entities resolved twice, white space collapsed;
    case is kept), and a prompt's embeddings end with its end mark: the network that takes them pads.

    Args:
        path: folder of the model, or ``owner/name`` of a hub repository, which is then downloaded
            (Wan-AI/Wan2.2-TI2V-5B-Diffusers).
        subfolder: folder inside it with the encoder's config.json and safetensors weights.
        tokenizer: folder inside it with the tokenizer's files.
        dtype: type the network computes in: bfloat16, float16 or float32; embeddings come in float32.
        text_len: the most tokens a prompt may have, end mark included; longer ones are cut.
        batch_size: prompts per pass; they are padded to the longest of a pass and masked.

    Raises:
        OviError: for missing or unfit files, a tokenizer that tells no prompts apart, or a missing package ftfy.
    """

    incidental_knobs = frozenset({"path", "subfolder", "tokenizer", "dtype", "batch_size"})

    def __init__(
        self,
        *,
        path: str,
        subfolder: str = "text_encoder",
        tokenizer: str = "tokenizer",
        dtype: str = "bfloat16",
        text_len: int = 512,
        batch_size: int = 8,
    ) -> None:
        compute = find_dtype("umt5", dtype)
        if text_len < 2 or batch_size < 1:
            raise OviError(f"umt5: need text_len >= 2 and batch_size >= 1, got {text_len} and {batch_size}")
        _need_ftfy()
        root = weights_folder(
            "umt5",
            path,
            repo=REPO,
            patterns=[f"{subfolder}/*", f"{tokenizer}/*"],
            expected=f"{subfolder}/config.json, {subfolder}/model.safetensors (or its parts) and {tokenizer}/",
        )
        files = safetensors_files("umt5", root / subfolder, "model", repo=REPO)
        marks = [root / tokenizer / name for name in TOKENIZER_FILES if (root / tokenizer / name).is_file()]
        if not marks:
            raise OviError(
                f"umt5: {root / tokenizer} has neither {' nor '.join(TOKENIZER_FILES)}; it must be a copy of that "
                f"folder of {REPO}: check path and tokenizer"
            )
        pieces = _load_tokenizer(root / tokenizer)
        model = _load_encoder(root / subfolder, compute)
        largest = max(pieces.get_vocab().values())
        if largest >= model.config.vocab_size:
            raise OviError(
                f"umt5: the tokenizer in {root / tokenizer} numbers its tokens up to {largest}, the encoder knows "
                f"{model.config.vocab_size}: they are of different models; check path and tokenizer"
            )
        super().__init__(model.config.d_model, text_len)
        self.tokenizer, self.model, self.batch_size = pieces, model, batch_size
        self.weight_files = (*files, *marks)

    @cached_property
    def weights_sha256(self) -> str:
        """Digest of the weights and the tokenizer."""
        return files_sha256(self.weight_files)

    def state(self) -> dict[str, Any]:
        """JSON-ready digest of what embeds."""
        return {"weights_sha256": self.weights_sha256}

    def load_state(self, state: dict[str, Any]) -> None:
        """Compare with a stored digest.

        Raises:
            OviError: when the embeddings are of other weights or another tokenizer.
        """
        same_weights("UMT5", state.get("weights_sha256"), self.weights_sha256, self.weight_files)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> list[Tensor]:
        """Prompts to last hidden states [n_i, text_dim] each, float32; the empty prompt has its end mark alone."""
        tokens = [
            self.tokenizer(published_clean(prompt), truncation=True, max_length=self.text_len)["input_ids"]
            for prompt in prompts
        ]
        embeddings: list[Tensor] = [torch.empty(0)] * len(prompts)
        # Like lengths together: little of a pass is padding.
        order = sorted(range(len(prompts)), key=lambda at: len(tokens[at]))
        for begin in range(0, len(order), self.batch_size):
            chosen = order[begin : begin + self.batch_size]
            for at, embedding in zip(chosen, self._encode([tokens[at] for at in chosen])):
                embeddings[at] = embedding
        return embeddings

    def _encode(self, tokens: list[list[int]]) -> list[Tensor]:
        lengths = [len(ids) for ids in tokens]
        ids = torch.zeros(len(tokens), max(lengths), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, own in enumerate(tokens):
            ids[row, : len(own)] = torch.tensor(own)
            mask[row, : len(own)] = 1
        device = self.model.device
        hidden = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state.float()
        return [hidden[row, :length].clone() for row, length in enumerate(lengths)]


def published_clean(prompt: str) -> str:
    """Prompt as the published pipeline cleans it: mojibake mended, HTML entities resolved, white space collapsed."""
    import ftfy

    # Twice, because scraped captions often went through two escapes.
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


def _need_ftfy() -> None:
    try:
        import ftfy  # noqa: F401
    except ImportError as error:
        raise OviError(
            "umt5 cleans prompts with the package ftfy, as the published pipeline does: pip install ftfy"
        ) from error


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the library raises many kinds for unfit files
        raise OviError(
            f"umt5: no tokenizer can be made of {folder} ({first_line(error)}); it must "
            f"be a copy of that folder of {REPO}"
        ) from error
    # From a folder with a config and no vocabulary the library makes a tokenizer that turns every word into "unknown":
    # the sentences have as many words of as many letters, so that only a vocabulary can tell them apart.
    probes = [tokenizer(text)["input_ids"] for text in ("a red ball bounces", "a low door squeaks", "")]
    if probes[0] == probes[1] or len(probes[0]) < 2 or not probes[2]:
        raise OviError(
            f"umt5: the tokenizer in {folder} does not tell prompts apart (two sentences become {probes[0]} and "
            f"{probes[1]}, no text {probes[2]}): it has no vocabulary or no end mark; copy that folder of {REPO} again"
        )
    return tokenizer


def _load_encoder(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import UMT5EncoderModel
    from transformers.utils import logging

    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind != "umt5":
        raise OviError(f"umt5: {folder} holds a model of type {kind}, expected umt5: check path and subfolder")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded: Any = UMT5EncoderModel.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # damaged or unfit files raise many kinds
        raise OviError(f"umt5: {folder} cannot be loaded ({first_line(error)}); fetch it again") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    model, report = loaded
    lacking = sorted(report["missing_keys"])
    if lacking or report["mismatched_keys"]:
        raise OviError(
            f"umt5: {folder} does not hold the encoder whole ({len(lacking)} tensors are lacking, such as "
            f"{lacking[:1]}; {len(report['mismatched_keys'])} are of another shape): fetch it again"
        )
    return model.eval().requires_grad_(False)
