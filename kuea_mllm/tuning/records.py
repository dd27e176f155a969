"""One conversation in the schema of LLaVA's mixture, checked, from either of two schemas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, TypedDict

IMAGE_TAG = "<image>"
HUMAN, ANSWER = "human", "gpt"

_SPEAKERS = {"user": HUMAN, "assistant": ANSWER}
_IMAGE_KEYS = ("image", "path", "url")

Turn = TypedDict("Turn", {"from": str, "value": str})


class Record(TypedDict):
    """One sample.

    Attributes:
        id: As the file says, as text.
        image: Path below the image folder, None for text alone.
        conversations: Turns, "from" "human" or "gpt", in the order of the file. The first may be an
            answer, which training leaves out.
    """

    id: str
    image: str | None
    conversations: list[Turn]


class MalformedRecord(ValueError):
    """A record nothing can be trained on.

    Args:
        kind: Short name of what is wrong, the same for all records with this fault.
        detail: What was found.
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail


def normalise(raw: object) -> Record:
    """Check a record and bring it into one form.

    Known are LLaVA's schema (`conversations` of `from` and `value`, `image`) and chat messages
    (`messages` of `role` and `content`, the latter a text or a list of text and image parts). A
    missing image and `null` mean the same.

    Raises:
        MalformedRecord: If nothing can be trained on it; says why.
    """
    if not isinstance(raw, Mapping):
        raise MalformedRecord("no object", f"it is {_shown(raw)}, not an object")
    if "conversations" in raw:
        turns = [_turn(entry, "conversations", number) for number, entry in _entries(raw)]
        images = _images(raw)
    elif "messages" in raw:
        images = _images(raw)
        turns = []
        for number, entry in _entries(raw, "messages"):
            turn, found = _message(entry, number)
            turns.append(turn)
            images += found
    else:
        raise MalformedRecord("no conversation", 'it has neither "conversations" nor "messages"')
    record: Record = {
        "id": str(raw.get("id", "")),
        "image": _only(images),
        "conversations": turns,
    }
    _check_order(turns)
    _check_tags(record)
    if not any(turn["value"].strip() for turn in turns):
        raise MalformedRecord("no words", "all turns are empty")
    return record


def count_words(record: Record) -> int:
    """Return the number of words in all turns, the one that training leaves out included."""
    return sum(len(turn["value"].split()) for turn in record["conversations"])


def signed_length(record: Record) -> int:
    """Return the words of a record, negative without an image, as the sampler wants them."""
    words = count_words(record)
    return words if record["image"] is not None else -words


def trained_turns(record: Record) -> list[Turn]:
    """Return the turns without an answer that comes before any question."""
    turns = record["conversations"]
    return turns[1:] if turns[0]["from"] != HUMAN else turns


def untrained_reason(record: Record) -> str | None:
    """Say why a well-formed record would not train anything, None if it would."""
    turns = trained_turns(record)
    if turns[-1]["from"] == HUMAN:
        return "the last question has no answer"
    for number, turn in enumerate(turns):
        if not turn["value"].strip():
            # Without its text the turn also lacks its end, and all labels of the sample go.
            return f"turn {number + 1} ({turn['from']}) is empty"
    return None


def leaves_folder(name: str) -> bool:
    """Whether a path is absolute or leads out of the folder it is relative to."""
    path = PurePath(name)
    depth = 0
    for part in path.parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            return True
    return path.is_absolute()


def _entries(raw: Mapping[Any, Any], key: str = "conversations") -> list[tuple[int, Any]]:
    entries = raw[key]
    if not isinstance(entries, list) or not entries:
        raise MalformedRecord("no conversation", f'"{key}" is {_shown(entries)}, not a list')
    return list(enumerate(entries, start=1))


def _turn(entry: object, key: str, number: int) -> Turn:
    if not isinstance(entry, Mapping):
        raise MalformedRecord("bad turn", f'turn {number} of "{key}" is {_shown(entry)}')
    speaker, value = entry.get("from"), entry.get("value")
    if speaker not in (HUMAN, ANSWER):
        raise MalformedRecord(
            "unknown speaker", f'turn {number} is from {_shown(speaker)}, not "human" or "gpt"'
        )
    if not isinstance(value, str):
        raise MalformedRecord("bad turn", f"the value of turn {number} is {_shown(value)}, no text")
    return {"from": speaker, "value": value}


def _message(entry: object, number: int) -> tuple[Turn, list[str]]:
    if not isinstance(entry, Mapping):
        raise MalformedRecord("bad turn", f'message {number} of "messages" is {_shown(entry)}')
    role, content = entry.get("role"), entry.get("content")
    if role == "system":
        raise MalformedRecord(
            "unknown speaker",
            f"message {number} is a system prompt, and the model's own is used: remove it",
        )
    if role not in _SPEAKERS:
        raise MalformedRecord(
            "unknown speaker", f'message {number} is of {_shown(role)}, not "user" or "assistant"'
        )
    if isinstance(content, str):
        return {"from": _SPEAKERS[role], "value": content}, []
    if not isinstance(content, list):
        raise MalformedRecord("bad turn", f"the content of message {number} is {_shown(content)}")
    texts, images = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image":
            texts.append(IMAGE_TAG)
            images += _image_of_part(part, number)
        else:
            raise MalformedRecord(
                "bad turn", f"message {number} has a part that is no text and no image"
            )
    return {"from": _SPEAKERS[role], "value": "\n".join(texts)}, images


def _image_of_part(part: Mapping[Any, Any], number: int) -> list[str]:
    # Some data sets name the picture here, others only once for the whole record.
    named = [part[key] for key in _IMAGE_KEYS if part.get(key) is not None]
    if not all(isinstance(name, str) for name in named) or len(named) > 1:
        raise MalformedRecord("bad image", f"the image of message {number} is not one path")
    return named


def _images(raw: Mapping[Any, Any]) -> list[str]:
    found = [raw["image"]] if raw.get("image") is not None else []
    if raw.get("images") is not None:
        if not isinstance(raw["images"], Sequence) or isinstance(raw["images"], str):
            raise MalformedRecord("bad image", '"images" is not a list')
        found += raw["images"]
    for name in found:
        if not isinstance(name, str):
            raise MalformedRecord("bad image", f"the image is {_shown(name)}, not a path")
    return found


def _only(images: list[str]) -> str | None:
    if len(images) > 1:
        raise MalformedRecord("several images", f"it has {len(images)} images, one is supported")
    if not images:
        return None
    if not images[0] or "://" in images[0]:
        raise MalformedRecord("bad image", f"the image is {_shown(images[0])}, not a path")
    if leaves_folder(images[0]):
        raise MalformedRecord(
            "path leaves the folder", f"image {images[0]} does not lie below the image folder"
        )
    return images[0]


def _check_order(turns: Sequence[Turn]) -> None:
    """Questions and answers take turns, apart from one answer before the first question."""
    first = 1 if turns[0]["from"] != HUMAN else 0
    if first == len(turns):
        raise MalformedRecord("no question", "it holds an answer only")
    for number, turn in enumerate(turns[first:]):
        expected = (HUMAN, ANSWER)[number % 2]
        if turn["from"] != expected:
            raise MalformedRecord(
                "turns do not alternate",
                f"turn {first + number + 1} is from {turn['from']}, as is the one before",
            )


def _check_tags(record: Record) -> None:
    # Several in one turn count as one, as in the original. In text alone a tag is just text.
    if record["image"] is None:
        return
    trained = trained_turns(record)
    tagged = sum(IMAGE_TAG in turn["value"] for turn in trained)
    if tagged != 1:
        raise MalformedRecord(
            "image tags do not match",
            f"{tagged} of its {len(trained)} turns have an {IMAGE_TAG} tag, and it has one image",
        )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
