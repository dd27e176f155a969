"""How many tokens every sample of a mixture takes: counted once, kept beside the mixture."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from kuea_mllm.adapters.base import ConversationEncoder
from kuea_mllm.errors import DataError
from kuea_mllm.io import disk_errors_named
from kuea_mllm.log import LOGGER
from kuea_mllm.training.interruption import outlive_signals
from kuea_mllm.tuning.collate import Collator
from kuea_mllm.tuning.examples import Example
from kuea_mllm.tuning.mixture import Mixture, one_at_a_time

# Raised whenever samples are encoded, cut or counted in another way.
_FORMAT = 1
_BATCH = 256
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "processor_config.json",
)
_LIBRARIES = ("kuea-mllm", "transformers", "tokenizers")


def encoder_identity(base: Path, adapter: str) -> str:
    """Return what token counts depend on beside the data: tokenizer files, adapter, libraries.

    Args:
        base: Model directory.
        adapter: Name of the adapter, whose code lays out a conversation.
    """
    digest = hashlib.sha256(f"{_FORMAT} {adapter}".encode())
    for name in _LIBRARIES:
        digest.update(f" {name} {version(name)}".encode())
    files = {path for pattern in _TOKENIZER_FILES for path in base.glob(pattern) if path.is_file()}
    for path in sorted(files):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def open_token_counts(
    mixture: Mixture,
    encoder: ConversationEncoder,
    collator: Collator,
    *,
    identity: str,
    workers: int = 0,
    progress: bool = True,
) -> NDArray[np.int32]:
    """Return the tokens that each sample takes in a batch, (samples,), memory-mapped.

    Counted the first time only. Of several processes that come at once, one does the work.

    Args:
        mixture: The records.
        encoder: Of the model to tune.
        collator: Cuts samples to their length and gives images their tokens.
        identity: From `encoder_identity`.
        workers: Processes that encode.
        progress: Whether to show a bar.

    Raises:
        DataError: If a record cannot be encoded, or what was kept is damaged.
    """
    key = f"{identity} {collator.max_length} {collator.tokens_per_image}"
    name = f"tokens-{hashlib.sha256(key.encode()).hexdigest()[:24]}.npy"
    path = mixture.folder / name
    if not path.is_file():
        with one_at_a_time(mixture.folder / f".{name}.lock"):
            if not path.is_file():
                counts = _count(mixture, encoder, collator, workers=workers, progress=progress)
                _write(path, counts)
    return _read(path, len(mixture))


class _Counts(Dataset[NDArray[np.int32]]):
    """Token counts of consecutive records."""

    def __init__(self, mixture: Mixture, encoder: ConversationEncoder, collator: Collator) -> None:
        self._mixture = mixture
        self._encoder = encoder
        self._collator = collator

    def __len__(self) -> int:
        return math.ceil(len(self._mixture) / _BATCH)

    def __getitem__(self, number: int) -> NDArray[np.int32]:
        begin = number * _BATCH
        positions = range(begin, min(begin + _BATCH, len(self._mixture)))
        return np.array([self._tokens(position) for position in positions], dtype=np.int32)

    def _tokens(self, position: int) -> int:
        encoded = self._encoder.encode(self._mixture.record(position))
        return self._collator.count_tokens(
            Example(position, encoded.input_ids, encoded.labels, None, 0)
        )


def _count(
    mixture: Mixture,
    encoder: ConversationEncoder,
    collator: Collator,
    *,
    workers: int,
    progress: bool,
) -> NDArray[np.int32]:
    LOGGER.info("counting the tokens of %s, once; kept in %s", mixture.source, mixture.folder)
    loader: Iterable[Any] = DataLoader(
        _Counts(mixture, encoder, collator),
        batch_size=None,
        # As they are: the default makes tensors of them.
        collate_fn=_same,
        num_workers=workers,
        worker_init_fn=outlive_signals,
        generator=torch.Generator(),
    )
    found: list[NDArray[np.int32]] = []
    with tqdm(total=len(mixture), desc="count tokens", unit="sample", disable=not progress) as bar:
        for counts in loader:
            found.append(counts)
            bar.update(len(counts))
    return np.concatenate(found)


def _same(value: Any) -> Any:
    return value


def _write(path: Path, counts: NDArray[np.int32]) -> None:
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with disk_errors_named(path), partial.open("wb") as file:
            np.save(file, counts)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path, samples: int) -> NDArray[np.int32]:
    try:
        counts: NDArray[np.int32] = np.load(path, mmap_mode="r")
    except (ValueError, EOFError):
        counts = np.zeros(0, dtype=np.int32)
    if counts.shape != (samples,) or counts.dtype != np.int32 or counts.min() < 1:
        raise DataError(
            f"the kept token counts {path} are damaged.",
            "Remove that file; it is made again by itself.",
        )
    return counts
