"""CLAP by the laion_clap package, the field's choice, from local files and without asking any hub."""

from __future__ import annotations

import hashlib
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ovi.errors import OviError
from ovi.metrics.clap.backend import CLAP_BACKENDS, ClapBackend, check_tokenizer
from ovi.metrics.features.weights import WeightsFile, file_digest

STANDARD = WeightsFile(
    "music_speech_audioset_epoch_15_esc_89.98.pt",
    "https://huggingface.co/lukewys/laion_clap",
    "51c68f12f9d7ea25fdaaccf741ec7f81e93ee594455410f3bca4f47f88d8e006",
    2_352_471_003,
)

NUM_ENTRIES = 50_265
_GREETING, _GREETING_IDS = "Hello world", [0, 31414, 232, 2]
"""What RoBERTa's vocabulary makes of two words, as its documentation in transformers has it."""
_TOKENIZER_FILES = ("vocab.json", "merges.txt")
_TOKENIZER_ORIGIN = "https://huggingface.co/FacebookAI/roberta-base"
_POSITIONS = "text_branch.embeddings.position_ids"


@CLAP_BACKENDS.register("laion_clap")
class LaionClap(ClapBackend):
    """CLAP of laion_clap with a RoBERTa text branch, without fusion: the protocol of av-benchmark.

    Sound comes as floats: laion_clap rounds to 16 bits only where it is handed numpy arrays or files, and av-benchmark
    hands it tensors.

    Its tag is ``clap_<stem of the file>``; a file named as the published one, of another content (re-saved, say),
    carries the start of its checksum there.

    Args:
        checkpoint: weights file, usually music_speech_audioset_epoch_15_esc_89.98.pt, or a folder that holds it.
        tokenizer: folder with vocab.json and merges.txt of roberta-base.
        amodel: audio network of the checkpoint, by laion_clap's name for it; its "audio" files mostly are HTSAT-base,
            its 630k files HTSAT-tiny.

    Raises:
        OviError: when a file or the package is missing, the tokenizer is not RoBERTa's, or the checkpoint is of
            another network.
    """

    def __init__(
        self, *, checkpoint: str | None = None, tokenizer: str | None = None, amodel: str = "HTSAT-base"
    ) -> None:
        super().__init__()
        file = STANDARD.find(checkpoint, "checkpoint", any_weights=True)
        folder = _tokenizer_folder(tokenizer)
        self.tokenizer = _roberta_tokenizer(folder)
        network = _network(amodel, self.tokenizer)
        _load(network.model, file, amodel)
        self.clap = network
        self.embed_dim = int(network.model.joint_embed_shape)
        checksum = file_digest(file)
        renamed = file.name == STANDARD.name and checksum != STANDARD.digest
        self.name = f"{file.stem}_{checksum[:8]}" if renamed else file.stem
        parts = [checksum, *(file_digest(folder / name) for name in _TOKENIZER_FILES), amodel]
        self.digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        self.freeze()

    def texts(self, captions: list[str]) -> Tensor:
        return self.clap.get_text_embedding(captions, use_tensor=True)

    def window(self, waveform: Tensor) -> Tensor:
        return self.clap.get_audio_embedding_from_data([waveform], use_tensor=True)[0]

    def count_tokens(self, caption: str) -> int:
        return len(self.tokenizer(caption)["input_ids"])


def _tokenizer_folder(given: str | None) -> Path:
    wanted = f"a folder with {' and '.join(_TOKENIZER_FILES)} of roberta-base ({_TOKENIZER_ORIGIN})"
    if given is None:
        raise OviError(f"tokenizer is not set: laion_clap needs {wanted}")
    folder = Path(given).expanduser()
    missing = [name for name in _TOKENIZER_FILES if not (folder / name).is_file()]
    if missing:
        raise OviError(f"tokenizer={given}: has no {' and no '.join(missing)}. laion_clap needs {wanted}")
    return folder


def _roberta_tokenizer(folder: Path) -> Any:
    from transformers import RobertaTokenizer

    tokenizer = RobertaTokenizer.from_pretrained(str(folder), local_files_only=True)
    knob = f"tokenizer={folder}"
    if len(tokenizer) != NUM_ENTRIES:
        raise OviError(
            f"{knob}: has {len(tokenizer)} entries, where roberta-base has {NUM_ENTRIES}: take vocab.json and "
            f"merges.txt from {_TOKENIZER_ORIGIN}"
        )
    check_tokenizer(tokenizer, set(tokenizer.all_special_ids), knob)
    found = tokenizer(_GREETING)["input_ids"]
    if found != _GREETING_IDS:
        raise OviError(
            f"{knob}: is not RoBERTa's vocabulary: it makes {found} of {_GREETING!r}, where roberta-base makes "
            f"{_GREETING_IDS}"
        )
    return tokenizer


def _network(amodel: str, tokenizer: Any) -> Any:
    """laion_clap's network with weights yet to be loaded."""
    with _without_hub(tokenizer), torch.random.fork_rng(devices=[]):  # weights are drawn, to be overwritten
        try:
            import laion_clap
        except ImportError as error:
            raise OviError(
                f"the laion_clap backend needs the package laion-clap and what it imports ({error}). It works with "
                "numpy 2 in spite of its pin: pip install --no-deps laion-clap, then what is missing; or take the "
                "backend transformers"
            ) from error
        from clap_module import list_models

        known = [name for name in list_models() if name.startswith(("HTSAT", "PANN"))]
        if amodel not in known:
            raise OviError(f"amodel={amodel}: laion_clap knows {', '.join(known)}")
        return laion_clap.CLAP_Module(enable_fusion=False, device="cpu", amodel=amodel, tmodel="roberta")


@contextmanager
def _without_hub(tokenizer: Any) -> Iterator[None]:
    """In here what laion_clap fetches, on import and in its constructor, is there already.

    RoBERTa's tokenizer is the given one, those of the text branches we do not use are None, and RoBERTa's network comes
    from its configuration: CLAP's checkpoint holds its weights.
    """
    from transformers import BartTokenizer, BertTokenizer, RobertaConfig, RobertaModel, RobertaTokenizer

    roberta_base = RobertaConfig(  # its sizes are the defaults, but for these
        vocab_size=NUM_ENTRIES, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5
    )
    path = list(sys.path)
    with ExitStack() as stack:
        stack.enter_context(_fetching(BertTokenizer, lambda: None))
        stack.enter_context(_fetching(BartTokenizer, lambda: None))
        stack.enter_context(
            _fetching(RobertaTokenizer, lambda: tokenizer)
        )  # last: transformers 5 has one class for both
        stack.enter_context(_fetching(RobertaModel, lambda: RobertaModel(roberta_base)))
        try:
            yield
        finally:
            sys.path[:] = path  # laion_clap adds its own folder, with modules of names such as `training`


@contextmanager
def _fetching(kind: Any, get: Callable[[], Any]) -> Iterator[None]:
    """``kind.from_pretrained`` gives what ``get`` does."""
    own = vars(kind).get("from_pretrained")
    kind.from_pretrained = staticmethod(lambda *_, **__: get())
    try:
        yield
    finally:
        if own is None:
            del kind.from_pretrained
        else:
            kind.from_pretrained = own


def _load(model: nn.Module, file: Path, amodel: str) -> None:
    """Weights of a published checkpoint (``state_dict`` with ``module.`` before each key), or saved anew without."""
    try:
        with torch.serialization.safe_globals(_numbers()):
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise OviError(
            f"checkpoint={file}: cannot be read as tensors and plain numbers, and nothing else is let in: {error}"
        ) from error
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else checkpoint
    if not isinstance(state, Mapping):
        raise OviError(f"checkpoint={file}: holds {type(state).__name__}, expected a dictionary of tensors")
    state = {key.removeprefix("module."): value for key, value in state.items()}
    state.pop(_POSITIONS, None)  # counted, not learnt; transformers keeps it no longer
    wanted = model.state_dict()
    wrong = sorted(
        {k for k in wanted.keys() ^ state.keys()}
        | {k for k in wanted.keys() & state if wanted[k].shape != state[k].shape}
    )
    if wrong:
        shown = ", ".join(wrong[:3])
        raise OviError(
            f"checkpoint={file}: is not of a CLAP with amodel={amodel} and without fusion: {len(wrong)} tensors are "
            f"missing, left over or of another shape ({shown}{', ...' if len(wrong) > 3 else ''}); set amodel"
        )
    model.load_state_dict(state)


def _numbers() -> list[Any]:
    """What a checkpoint may hold beside tensors: numpy's scalars, which training scripts leave among its figures.

    They are rebuilt from a type and bytes; nothing of the file is run. Files written under numpy 1 name the same
    function by another path.
    """
    kinds = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)]
    build = np.float64(0.0).__reduce__()[0]
    return [(build, "numpy.core.multiarray.scalar"), (build, "numpy._core.multiarray.scalar"), np.dtype, *kinds]
