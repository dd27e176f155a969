"""How many rows of an output layer stand for tokens, from files alone (no torch)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kuea_mllm.errors import UserError
from kuea_mllm.io import read_json

_FAST_FILE = "tokenizer.json"
_SETTINGS_FILE = "tokenizer_config.json"
_ADDED_FILE = "added_tokens.json"


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokens that a directory's tokenizer files name.

    Attributes:
        path: File that holds them.
        words: Ids of the vocabulary proper.
        added: Ids of tokens that were added to it, by text; they may be words of it as well.
    """

    path: Path
    words: Mapping[str, int]
    added: Mapping[str, int]

    @property
    def ids(self) -> set[int]:
        """Return the ids of all tokens."""
        return {*self.words.values(), *self.added.values()}


def read_tokenizer_files(base: Path) -> TokenizerFiles:
    """Read the ids of a tokenizer without making it.

    Raises:
        UserError: If there is no `tokenizer.json`, or it lists no tokens.
    """
    path = base / _FAST_FILE
    if not path.is_file():
        raise UserError(
            f"{base} has no {_FAST_FILE}, which says what the rows of its output layer stand for.",
            "Write one: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR).",
        )
    content = read_json(path)
    model = content.get("model") if isinstance(content, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):
        # Unigram models list pairs of text and score.
        vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise UserError(
            f"file {path} lists no vocabulary.", "Restore the tokenizer files from the base model."
        )
    added = {str(each["content"]): int(each["id"]) for each in content.get("added_tokens", ())}
    return TokenizerFiles(path, vocabulary, added | _stated_elsewhere(base))


def count_token_rows(files: TokenizerFiles, rows: int, *, additions: Collection[str]) -> int:
    """Return how many leading rows of an output layer stand for tokens of the language model.

    Rows behind the tokenizer's last token only fill up. Tokens which were added for images and
    padding, and come last, were not in the vocabulary that the language model was trained with, so
    that their rows do not belong in a softmax either.

    Args:
        files: The tokenizer.
        rows: Rows of the output layer.
        additions: Texts of such tokens, as far as the tokenizer has them.

    Raises:
        UserError: If the tokenizer leaves gaps, or has more tokens than there are rows.
    """
    ids = files.ids
    own = {
        number
        for text, number in files.added.items()
        if text in additions and text not in files.words
    }
    count = max(ids) + 1
    if missing := sorted(set(range(count)) - ids):
        raise UserError(
            f"file {files.path} has no token with the id {missing[0]} ({len(missing)} gaps below "
            f"{count}), so that it is not known which rows of the output layer are in use.",
            "Restore the tokenizer files from the base model.",
        )
    if count > rows:
        raise UserError(
            f"file {files.path} has {count} tokens, config.json says vocab_size {rows}.",
            "Restore the tokenizer and the configuration from the base model.",
        )
    while count - 1 in own:
        count -= 1
    return count


def _stated_elsewhere(base: Path) -> dict[str, int]:
    """Return the added tokens of the other two places, which may be ahead of `tokenizer.json`."""
    found: dict[str, int] = {}
    stated: Any
    if (base / _SETTINGS_FILE).is_file():
        stated = read_json(base / _SETTINGS_FILE).get("added_tokens_decoder") or {}
        found |= {str(token["content"]): int(number) for number, token in stated.items()}
    if (base / _ADDED_FILE).is_file():
        found |= {str(text): int(number) for text, number in read_json(base / _ADDED_FILE).items()}
    return found
