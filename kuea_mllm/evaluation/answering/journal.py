"""The answers of a column that is not finished, on disk as they come.

lmms-eval's own response cache does not serve here: it stores the answers of a call when the call
has returned, and all questions of a column are one call.

One file for every process, one line for every answer:

{"content": "<what is asked, or null>"}
{"document": 7, "question": "<digest>", "answer": "yes"}
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kuea_mllm.errors import DataError, EvaluationError

if TYPE_CHECKING:
    from kuea_mllm.evaluation.answering.questions import PendingQuestion

SUFFIX = ".jsonl"

Known = Mapping[tuple[int, str], deque[str]]


class Journal:
    """Answers kept between sittings.

    Args:
        folder: Of one column.
        content: What the column's data are recognised by; None where that is not known.
    """

    def __init__(self, folder: Path, content: str | None = None) -> None:
        self.folder = folder
        self.content = content

    def known_answers(self, questions: Sequence[PendingQuestion]) -> dict[int, str]:
        """Return the answers that are there, by the place of their question.

        Raises:
            EvaluationError: If they were given to other data.
            DataError: If a file is damaged.
        """
        known: defaultdict[tuple[int, str], deque[str]] = defaultdict(deque)
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            for line in self._lines(path):
                known[line["document"], line["question"]].append(line["answer"])
        found = {}
        for place, question in enumerate(questions):
            # One answer each: a task may ask the same thing several times.
            if waiting := known.get((question.doc_id, digest_of(question))):
                found[place] = waiting.popleft()
        return found

    def write(self, answers: Sequence[tuple[PendingQuestion, str]], *, process: int) -> None:
        """Add answers; they are in the file when this returns.

        Args:
            answers: With their questions.
            process: Which one this is; each has a file of its own.
        """
        path = self.folder / f"{process}{SUFFIX}"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(_line({"content": self.content}), encoding="utf-8")
        _drop_torn_line(path)
        lines = [
            _line({"document": q.doc_id, "question": digest_of(q), "answer": answer})
            for q, answer in answers
        ]
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))

    def _lines(self, path: Path) -> list[dict[str, Any]]:
        # What stands behind the last line break was being written when the process was killed.
        whole = path.read_bytes().split(b"\n")[:-1]
        try:
            lines: list[dict[str, Any]] = [json.loads(line) for line in whole]
            if lines and lines[0]["content"] != self.content:
                raise EvaluationError(
                    f"--resume: the answers in {path} were given to other questions: files of "
                    "the data set have changed.",
                    "Restore them, or drop the unfinished evaluation with --restart.",
                )
            for line in lines[1:]:
                _ = line["document"], line["question"], line["answer"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"the kept answers in {path} are damaged ({type(error).__name__}: {error}).",
                "Drop the unfinished evaluation with --restart.",
            ) from error
        return lines[1:]


def digest_of(question: PendingQuestion) -> str:
    """Return what a question is recognised by: its task, words and way of answering."""
    text = "\0".join((question.task, question.prompt, repr(question.settings)))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def holds_answers(folder: Path) -> bool:
    """Say whether a folder of journals holds an answer of any column."""
    return any(path.read_bytes().count(b"\n") > 1 for path in folder.glob(f"*/*{SUFFIX}"))


def _line(content: Mapping[str, Any]) -> str:
    return json.dumps(content) + "\n"


def _drop_torn_line(path: Path) -> None:
    with path.open("rb+") as file:
        size = file.seek(0, 2)
        if size == 0:
            return
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
