"""Training samples of a VLM in the words of its own chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kuea_mllm.adapters.turns import IGNORED, IMAGE_PLACEHOLDER, IMAGE_TAG, alternating_turns
from kuea_mllm.errors import DataError, UserError

if TYPE_CHECKING:
    from PIL.Image import Image

_ROLES = ("user", "assistant")
_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")

Message = Mapping[str, Any]
Span = tuple[int, int]


class EncodedChat(NamedTuple):
    """One sample; see `EncodedSample`."""

    input_ids: list[int]
    labels: list[int]
    left_out: int


@dataclass(frozen=True)
class ImagePlace:
    """How a processor writes an image.

    Attributes:
        tag: What the chat template puts where an image belongs.
        text: What the processor makes of it, the token of image patches once instead of repeated.
        token_id: That token.
        count: How often the processor repeats it.
        adds_special_tokens: Whether it has the tokenizer add tokens that the template lacks.
    """

    tag: str
    text: str
    token_id: int
    count: int
    adds_special_tokens: bool


class ChatConversations:
    """Encodes conversations by chat template; learned are answers and the tokens that end them.

    The image stands where the record has its tag, or first. Tokens of the model that stand for
    images are removed from the text of turns, as in questions to the model.

    Args:
        tokenizer: A fast tokenizer.
        template: Chat template.
        place: How an image is written.
        ends: Tokens that end an answer.
        image_words: Texts that must not be in a turn.
        max_length: Longest sample in tokens.
        where: What to call the model in messages.

    Raises:
        UserError: If the template does not show which part of a text is an answer.
    """

    placeholder = IMAGE_PLACEHOLDER

    def __init__(
        self,
        tokenizer: Any,
        template: str,
        place: ImagePlace,
        *,
        ends: Sequence[str],
        image_words: Sequence[str],
        max_length: int,
        where: str,
    ) -> None:
        if tokenizer.pad_token_id is None:
            raise UserError(
                f"the tokenizer in {where} names no padding token.",
                'Set "pad_token" in its tokenizer_config.json.',
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.pad_token_id: int = tokenizer.pad_token_id
        self._template = template
        self._place = place
        self._ends = tuple(ends)
        self._image_words = tuple(image_words)
        self._where = where
        # Found out now instead of at the first sample.
        self.answers(self.messages(_PROBE))

    def encode(self, record: Mapping[str, Any]) -> EncodedChat:
        """Encode a record in the schema of LLaVA's mixture.

        Raises:
            DataError: If its turns do not alternate, or the template cannot take them; names the
                record.
        """
        messages = self.messages(record)
        try:
            text, spans = self.answers(messages)
        # The template is a program of the model's, and may raise anything.
        except Exception as error:
            raise DataError(
                f"record {record.get('id')!r}: the chat template of {self._where} cannot take it "
                f"({type(error).__name__}: {error}).",
                "Take it out of the data.",
            ) from error
        has_image = record.get("image") is not None
        if text.count(self._place.tag) != int(has_image):
            raise DataError(
                f"record {record.get('id')!r}: the chat template of {self._where} makes "
                f"{text.count(self._place.tag)} places for its {int(has_image)} images.",
                "Take it out of the data.",
            )
        text, spans = self._with_image(text, spans)
        encoded = self.tokenizer(
            text,
            add_special_tokens=self._place.adds_special_tokens,
            return_offsets_mapping=True,
        )
        ids: list[int] = encoded["input_ids"]
        labels = [IGNORED] * len(ids)
        for number, (start, end) in enumerate(encoded["offset_mapping"]):
            if any(start < last and end > first for first, last in spans):
                labels[number] = ids[number]
        image = self._place.token_id
        return EncodedChat([IMAGE_PLACEHOLDER if i == image else i for i in ids], labels, 0)

    def messages(self, record: Mapping[str, Any], image: Image | None = None) -> list[Message]:
        """Return the messages of a record as chat templates take them."""
        turns = alternating_turns(record)
        place = -1
        if record.get("image") is not None:
            tagged = [n for n, t in enumerate(turns) if n % 2 == 0 and IMAGE_TAG in t["value"]]
            place = (tagged or [0])[0]
        return [
            {
                "role": _ROLES[number % 2],
                "content": self._content(turn["value"], place, number, image),
            }
            for number, turn in enumerate(turns)
        ]

    def answers(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """Return the text of a conversation, and where in it the answers and their ends are.

        Raises:
            UserError: If the template does not show it.
        """
        text, _ = self._render(messages)
        spans: list[Span] = []
        for number in range(1, len(messages), 2):
            asked, _ = self._render(messages[:number], add_generation_prompt=True)
            answered, _ = self._render(messages[: number + 1])
            if not answered.startswith(asked) or not text.startswith(answered):
                return self._marked_answers(messages)
            spans.append((len(asked), self._end_of(answered, len(asked))))
        return text, spans

    def _marked_answers(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        if not _MARKS_ANSWERS.search(self._template):
            raise UserError(
                f"the chat template of {self._where} writes the beginning of a conversation in "
                "another way when the conversation goes on, and marks no answers.",
                "Put {% generation %} ... {% endgeneration %} around answers in "
                "chat_template.jinja.",
            )
        text, spans = self._render(messages, return_assistant_tokens_mask=True)
        if len(spans) != len(messages) // 2:
            raise UserError(
                f"the chat template of {self._where} marks {len(spans)} of {len(messages) // 2} "
                "answers with {% generation %}.",
                "Put {% generation %} ... {% endgeneration %} around every answer.",
            )
        found = []
        for first, last in spans:
            after = next((len(end) for end in self._ends if text.startswith(end, last)), 0)
            found.append((first, self._end_of(text[: last + after], first)))
        return text, found

    def _end_of(self, text: str, start: int) -> int:
        """Return where the last token that ends an answer ends, at or behind a place."""
        found = [at + len(end) for end in self._ends if (at := text.rfind(end, start)) >= 0]
        if not found:
            raise UserError(
                f"the chat template of {self._where} puts no token behind an answer that ends it "
                f"(known: {', '.join(map(repr, self._ends)) or 'none'}), so that a tuned model "
                "would not stop.",
                "Use the chat template that the model was trained with, or an adapter of its own.",
            )
        return max(found)

    def _render(self, messages: Sequence[Message], **options: Any) -> tuple[str, list[Span]]:
        from transformers.utils import chat_template_utils

        # Its annotation says that it returns a text.
        render: Any = chat_template_utils.render_jinja_template
        texts, spans = render(
            conversations=[list(messages)],
            chat_template=self._template,
            **options,
            **self.tokenizer.special_tokens_map,
        )
        return str(texts[0]), [(first, last) for first, last in (spans or [[]])[0]]

    def _content(
        self, value: str, place: int, number: int, image: Image | None
    ) -> list[dict[str, Any]]:
        if place < 0:
            return [self._part(value)]
        before, tag, after = value.partition(IMAGE_TAG)
        if place != number:
            return [self._part(value.replace(IMAGE_TAG, "").strip() if tag else value)]
        if not tag:
            before, after = "", before
        pieces = [before.rstrip(), after.replace(IMAGE_TAG, "").lstrip()]
        first, last = ([self._part(piece)] if piece else [] for piece in pieces)
        return [*first, {"type": "image"} | ({"image": image} if image else {}), *last]

    def _part(self, text: str) -> dict[str, Any]:
        for word in self._image_words:
            text = text.replace(word, "")
        return {"type": "text", "text": text}

    def _with_image(self, text: str, spans: Sequence[Span]) -> tuple[str, list[Span]]:
        """Write the image as the processor does, and move what is behind it."""
        at = text.find(self._place.tag)
        if at < 0:
            return text, list(spans)
        added = len(self._place.text) - len(self._place.tag)
        text = text[:at] + self._place.text + text[at + len(self._place.tag) :]
        return text, [
            (first + added * (first > at), last + added * (last > at)) for first, last in spans
        ]


_PROBE = {
    "id": "probe",
    "conversations": [
        {"from": "human", "value": "What is it?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Where?"},
        {"from": "gpt", "value": "There."},
    ],
}
