"""Synthetic samples, as long as those of the mixture of LLaVA-1.5."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from kuea_mllm.tuning.collate import IGNORED
from kuea_mllm.tuning.examples import Example
from lora_parts.models import Size

PLACEHOLDER = -200

# Records by source as the mixture's authors counted them, whether they have an image, and an
# ASSUMED median and spread (of the logarithm) of the tokens of their text.
SOURCES = (
    (157_712, True, 260, 0.45),  # LLaVA-Instruct
    (82_783, True, 240, 0.40),  # VQAv2
    (8_998, True, 90, 0.20),  # OKVQA
    (66_160, True, 110, 0.20),  # A-OKVQA
    (48_447, True, 330, 0.60),  # RefCOCO
    (72_140, True, 280, 0.45),  # GQA
    (80_000, True, 220, 0.30),  # OCR-VQA
    (21_953, True, 85, 0.20),  # TextCaps
    (86_417, True, 480, 0.60),  # Visual Genome
    (40_688, False, 1100, 0.70),  # ShareGPT
)
TOKENS_PER_WORD = 1.35


def mixture_lengths(
    count: int, *, max_length: int, image_tokens: int, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return signed lengths in words and lengths in tokens of a synthetic mixture.

    Args:
        count: Samples; the sources keep their shares.
        max_length: Where tokens are cut; texts are shortened with it from 2048.
        image_tokens: Of one image.
        seed: Of the numbers.
    """
    numbers = np.random.default_rng(seed)
    records = np.array([source[0] for source in SOURCES])
    source = numbers.choice(len(SOURCES), count, p=records / records.sum())
    has_image = np.array([each[1] for each in SOURCES])[source]
    median, spread = (np.array([each[n] for each in SOURCES])[source] for n in (2, 3))
    text = median * np.exp(spread * numbers.standard_normal(count)) * max_length / 2048
    words = np.maximum(1, text / TOKENS_PER_WORD * numbers.uniform(0.9, 1.1, count))
    tokens = np.minimum(np.maximum(8, text) + has_image * image_tokens, max_length)
    return np.where(has_image, words, -words).astype(np.int64), tokens.astype(np.int64)


class Samples(Dataset[Example]):
    """Random samples in memory, and what the trainer asks a mixture for."""

    source = folder = Path("synthetic")

    def __init__(self, size: Size, words: int, image_tokens: int) -> None:
        self.signed, self.tokens = mixture_lengths(
            size.samples, max_length=size.max_length, image_tokens=image_tokens
        )
        if size.is_full:
            self.signed = np.full(size.samples, size.max_length)
            self.tokens = np.full(size.samples, size.max_length)
        numbers = torch.Generator().manual_seed(0)
        side = size.vision["image_size"]
        self.rows: list[Example] = []
        for position, total in enumerate(self.tokens.tolist()):
            has_image = bool(self.signed[position] > 0)
            text = total - has_image * image_tokens
            ids = torch.randint(260, words, (text,), generator=numbers).tolist()
            labels = [IGNORED] * (text // 2) + ids[text // 2 :]
            pixels = torch.randn(3, side, side, generator=numbers) if has_image else None
            if has_image:
                ids, labels = [PLACEHOLDER, *ids], [IGNORED, *labels]
            self.rows.append(Example(position, ids, labels, pixels, 0))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.rows[index]

    def lengths(self) -> NDArray[np.int64]:
        """Return the words of every sample, negative without an image."""
        return self.signed

    def name(self, index: int) -> str:
        """Return how messages call one sample."""
        return f"sample {index}"
