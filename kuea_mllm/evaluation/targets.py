"""The right answers of documents whose task names none, for people to look at.

Some task files of lmms-eval give as `doc_to_target` the name of a field that their documents do not
have ("answer", where they hold "answers"). lmms-eval takes that for a template without gaps: every
target is then the name itself. Scores do not suffer, as such tasks look into the document.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

_ANSWERS = ("answers", "answer")


def right_answers(document: Mapping[str, Any], target: object, rule: object) -> str | None:
    """Return the right answers of a document where its target is but the name of a missing field.

    Args:
        document: Its fields.
        target: Its target, as lmms-eval states it.
        rule: The task's `doc_to_target`.

    Returns:
        The different answers, those of most annotators first, joined by " | "; None where the
        target is one, or where the document has no field that holds them.
    """
    if not isinstance(rule, str) or target != rule or rule in document or not rule.isidentifier():
        return None
    for field in (f"{rule}s", rule.removesuffix("s"), *_ANSWERS):
        texts = _texts(document.get(field))
        if texts:
            return " | ".join(text for text, _ in Counter(texts).most_common())
    return None


def _texts(value: object) -> list[str]:
    """Return the answers that a field holds; nothing if it holds something else."""
    found = []
    for one in value if isinstance(value, list | tuple) else [value]:
        # VQAv2 keeps what an annotator said beside who it was.
        content = one.get("answer") if isinstance(one, Mapping) else one
        if isinstance(content, bool) or not isinstance(content, str | int | float):
            return []
        found.append(str(content))
    return [text for text in found if text.strip()]
