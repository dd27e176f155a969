"""Reading what a judge says, and keeping it."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kuea_mllm.errors import EvaluationError

LEAST, MOST = 1.0, 10.0
_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
_PAIR = re.compile(rf"({_NUMBER})[\s,;]+({_NUMBER})")


def parse_verdict(text: str) -> tuple[float, float] | None:
    """Read the scores of the two answers, the reference's first.

    They stand alone on the first line ("8 7", "8, 7" or "(8, 7)") and lie between 1 and 10.
    Anything else is no verdict: numbers picked out of a sentence ("Assistant 1: 8, ...") would
    often be the wrong ones.
    """
    lines = text.strip().splitlines()
    line = lines[0].strip() if lines else ""
    if line[:1] + line[-1:] in ("()", "[]"):
        line = line[1:-1].strip()
    found = _PAIR.fullmatch(line)
    if found is None:
        return None
    first, second = float(found[1]), float(found[2])
    if not (LEAST <= first <= MOST and LEAST <= second <= MOST):
        return None
    return first, second


def hash_request(request: Mapping[str, Any]) -> str:
    """Hash all that is sent to a judge: model, settings, messages (SHA-256, hex)."""
    text = json.dumps(request, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class VerdictFile:
    """The raw replies about one task, a line of JSON each, written as they come.

    Args:
        path: Read if it exists; a last line that was cut short is dropped.

    Raises:
        EvaluationError: If another line is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._scores: dict[tuple[int, str], tuple[float, float]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            path.write_bytes(whole)
        for number, line in enumerate(whole.splitlines(), start=1):
            self._remember(number, line)

    def scores(self, doc_id: int, request: str) -> tuple[float, float] | None:
        """Return the scores of a document in an earlier sitting, by the hash of the request."""
        return self._scores.get((doc_id, request))

    def append(self, record: Mapping[str, Any]) -> None:
        """Keep one reply; safe from several threads."""
        # ASCII only, as in the samples files.
        line = json.dumps(record, allow_nan=False) + "\n"
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(line)

    def _remember(self, number: int, line: bytes) -> None:
        try:
            record = json.loads(line)
            if record["scores"] is not None:
                first, second = record["scores"]
                key = int(record["doc_id"]), str(record["request"])
                self._scores[key] = (float(first), float(second))
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(
                f"file {self.path}, line {number} is not a verdict: {error}.",
                "Remove that line; its document is then judged again.",
            ) from error
