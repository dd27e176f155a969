"""Stems of answers for OK-VQA, whose annotated answers are stemmed words.

The published evaluation has a table of exceptions, WordNet for words in "-ing" and rules for
plurals. The table reproduces the stems of the data set, so it is read off the annotations here,
which give every answer raw and stemmed; other words go the way of the published rules. Nouns get
their singular from WordNet, where the published code asks another library.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from kuea_mllm.errors import EvaluationError

_RESOURCES = {
    "punkt_tab": "tokenizers/punkt_tab",
    "averaged_perceptron_tagger_eng": "taggers/averaged_perceptron_tagger_eng",
    "wordnet": "corpora/wordnet",
}
_PLURALS = ("NNS", "NNPS")


class Language(Protocol):
    """What stemming asks of a language library."""

    def tag(self, text: str) -> list[tuple[str, str]]:
        """Split a text and name the part of speech of each word."""
        ...

    def lemma(self, word: str, part: str) -> str:
        """Return the base form of a verb ("v") or noun ("n")."""
        ...


@dataclass
class Stemmer:
    """Stems answers.

    Attributes:
        table: Words whose stem is known.
        language: Knows the others.
    """

    table: Mapping[str, str]
    language: Language
    _known: dict[str, str] = field(default_factory=dict)

    def stem(self, answer: str) -> str:
        """Return the answer with every word stemmed, one blank between words."""
        if answer not in self._known:
            words = self.language.tag(answer)
            self._known[answer] = " ".join(self._stem(word, part) for word, part in words)
        return self._known[answer]

    def _stem(self, word: str, part: str) -> str:
        if word in self.table:
            return self.table[word]
        if word.endswith("ing"):
            return self.language.lemma(word, "v")
        return self.language.lemma(word, "n") if part in _PLURALS else word


def stem_table(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Learn the stem of each word from answers that are known raw and stemmed.

    Where a word has several stems, the most frequent one counts.
    """
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for raw, stemmed in pairs:
        words, stems = raw.split(), stemmed.split()
        if len(words) == len(stems):
            for word, stem in zip(words, stems, strict=True):
                counts[word][stem] += 1
    return {word: stems.most_common(1)[0][0] for word, stems in counts.items()}


def load_language() -> Language:
    """Open NLTK with its data.

    Raises:
        EvaluationError: Naming the data that are missing; answers are never compared without.
    """
    import nltk  # type: ignore[import-untyped]

    missing = []
    for name, place in _RESOURCES.items():
        # Newer downloads stay packed.
        if not any(_is_there(nltk, path) for path in (place, f"{place}.zip")):
            missing.append(name)
    if missing:
        raise EvaluationError(
            f"OK-VQA compares stems, which needs NLTK's data {', '.join(missing)}.",
            f"Run `python -m nltk.downloader {' '.join(missing)}`, or leave okvqa out of "
            "fewshot.datasets.",
        )
    return _Nltk(nltk)


def _is_there(nltk: Any, path: str) -> bool:
    try:
        nltk.data.find(path)
    except LookupError:
        return False
    return True


class _Nltk:
    def __init__(self, nltk: Any) -> None:
        self.nltk = nltk
        self.lemmatizer = nltk.stem.WordNetLemmatizer()

    def tag(self, text: str) -> list[tuple[str, str]]:
        tagged: list[tuple[str, str]] = self.nltk.pos_tag(self.nltk.word_tokenize(text))
        return tagged

    def lemma(self, word: str, part: str) -> str:
        return str(self.lemmatizer.lemmatize(word, pos=part))
