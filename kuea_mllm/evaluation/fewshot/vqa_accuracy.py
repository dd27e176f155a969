"""The accuracy of visual question answering, as the published evaluation computes it."""

from __future__ import annotations

import re
from collections.abc import Sequence

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,+\d")
_PERIOD = re.compile(r"\.(?!\d)")
# The original hands a flag to the place of a count: at most so many periods are removed.
_MOST_PERIODS = 32
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(value) for value, word in enumerate(_NUMBER_WORDS.split())} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}

# Contractions that get their apostrophe back. Not all that exist: the metric lacks "im" and "hell".
_ONE_APOSTROPHE = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's "
    "how'd how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've "
    "o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll "
    "someone's something'd something'll that's there'd there're there's they'd they'll they're "
    "they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's "
    "where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd "
    "you'll you're you've"
)
_TWO_APOSTROPHES = (
    "couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've "
    "someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll "
    "y'all'd've you'd've 'ow's'at"
)


def _contractions() -> dict[str, str]:
    table = {word.replace("'", ""): word for word in _ONE_APOSTROPHE.split()}
    for word in _TWO_APOSTROPHES.split():
        for place, letter in enumerate(word):
            if letter == "'":
                table[word[:place] + word[place + 1 :]] = word
    # One entry of the original stands the wrong way round.
    return table | {"somebody'd": "somebodyd"}


CONTRACTIONS = _contractions()


def strip_punctuation(text: str) -> str:
    """Remove or blank out punctuation, by rules that look at the whole text."""
    # A mark beside a blank, or a number with a comma anywhere, makes marks vanish; else they
    # become blanks.
    has_comma = _DIGIT_COMMA.search(text) is not None
    result = text
    for mark in _MARKS:
        vanishes = has_comma or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if vanishes else " ")
    return _PERIOD.sub("", result, count=_MOST_PERIODS)


def normalise_answer(text: str) -> str:
    """Bring an answer to the form in which answers are compared."""
    text = strip_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(
    prediction: str, answers: Sequence[str], entries: Sequence[int] | None = None
) -> float:
    """Score one answer: for each annotator, how many of the others agree, three being enough.

    Args:
        prediction: What the model says.
        answers: What the annotators say.
        entries: None compares with the answers of all other annotators. Otherwise answers with the
            same entry count as one annotator and vanish together, as the released scorer has it
            with annotations that are not numbered (VizWiz).

    Returns:
        Between 0 and 1.
    """
    places = list(range(len(answers))) if entries is None else list(entries)
    said = normalise_answer(prediction)
    agrees = [normalise_answer(answer) == said for answer in answers]
    scores = [
        min(1.0, sum(a for a, other in zip(agrees, places, strict=True) if other != own) / 3)
        for own in places
    ]
    return sum(scores) / len(scores)
