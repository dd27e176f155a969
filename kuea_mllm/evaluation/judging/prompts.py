"""What the judge is asked: the texts that LLaVA published, filled in as its scripts do.

The texts are read from the installed lmms-eval, which carries LLaVA's rule file unchanged.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kuea_mllm.errors import EnvironmentFailure, EvaluationError

SYSTEM_MESSAGE = "You are a helpful and precise assistant for checking the quality of the answer."
"""Both of LLaVA's scripts send this along."""

RULE_FILE = "tasks/llava-in-the-wild/rule.json"
"""Inside lmms-eval; the file beside the COCO task is the same."""

STOCK_TASKS: Mapping[str, str] = {
    "llava_in_the_wild": "llava-wild",
    "llava_bench_coco": "llava-coco",
}
"""Tasks of lmms-eval whose own judge gives 100 when it fails; ours is asked instead."""

_STOCK_REFERENCE = {"llava-wild": "gpt_answer", "llava-coco": "answer"}
_PREFIX = "llava_bench_"
_CATEGORIES = ("conv", "detail", "complex")


@dataclass(frozen=True)
class JudgedDocument:
    """What a judge has to know about one document.

    Attributes:
        doc_id: Position of the document in its split.
        question: What the model was asked.
        reference_answer: The answer that it is measured against.
        context: The image in words.
        category: "conv", "detail" or "complex".
        rule: Which of the published texts is used.
    """

    doc_id: int
    question: str
    reference_answer: str
    context: str
    category: str
    rule: str


@dataclass(frozen=True)
class Rules:
    """The published texts.

    Attributes:
        texts: Role name and prompt of every rule.
        sha256: Hash of the file.
    """

    texts: Mapping[str, tuple[str, str]]
    sha256: str

    def describe(self) -> dict[str, str]:
        """Say where the texts are from, for the record."""
        return {"source": f"lmms_eval/{RULE_FILE}", "sha256": self.sha256}


def load_rules() -> Rules:
    """Read the rule file of the installed lmms-eval; does not import lmms-eval.

    Raises:
        EnvironmentFailure: If it is not there.
    """
    found = importlib.util.find_spec("lmms_eval")
    places = list(found.submodule_search_locations or ()) if found is not None else []
    for place in places:
        path = Path(place) / RULE_FILE
        if path.is_file():
            content = path.read_bytes()
            texts = {key: (rule["role"], rule["prompt"]) for key, rule in _parse(content).items()}
            return Rules(texts, hashlib.sha256(content).hexdigest())
    raise EnvironmentFailure(
        f"lmms-eval holds no file {RULE_FILE}, the texts that a judge is asked with.",
        "Install the version of lmms-eval that kuea-mllm names: pip install lmms-eval==0.7.3.",
    )


def build_prompt(document: JudgedDocument, answer: str, rules: Rules) -> str:
    """Write the question to the judge.

    Args:
        document: Question, reference answer and image in words.
        answer: The model's answer; stands in the prompt as it is, whatever it says.
        rules: The published texts.

    Raises:
        EvaluationError: If there is no text for the document's rule.
    """
    if document.rule not in rules.texts:
        raise EvaluationError(
            f"document {document.doc_id} has the judging rule {document.rule!r}, which the rule "
            "file of lmms-eval does not know.",
            f"Its category must be one of {', '.join(_CATEGORIES)}.",
        )
    role, prompt = rules.texts[document.rule]
    parts = [
        f"[Context]\n{document.context}",
        f"[Question]\n{document.question}",
        f"[{role} 1]\n{document.reference_answer}",
        f"[End of {role} 1]",
        f"[{role} 2]\n{answer}",
        f"[End of {role} 2]",
        f"[System]\n{prompt}",
    ]
    text = "".join(f"{part}\n\n" for part in parts)
    # A tokenizer may write half a character, which cannot be sent.
    return text.encode("utf-8", errors="replace").decode("utf-8")


def imitates_layout(answer: str) -> bool:
    """Say whether an answer holds the marks that divide the judge's prompt."""
    return any(mark in answer for mark in ("[System]", "[End of Assistant", "[Assistant "))


def read_documents(
    task: str, rows: Sequence[tuple[int, Mapping[str, Any]]], *, column: str, protocol: str
) -> list[JudgedDocument]:
    """Collect what the judge has to know from the documents of a task.

    Args:
        task: Name of the task.
        rows: Document ids, and documents as lmms-eval holds them.
        column: "llava-wild" or "llava-coco".
        protocol: "paper", "padded" or "lmms-eval".

    Raises:
        EvaluationError: Naming task, document and key of what is missing.
    """
    return [_read_document(task, doc_id, row, column, protocol) for doc_id, row in rows]


def _read_document(
    task: str, doc_id: int, row: Mapping[str, Any], column: str, protocol: str
) -> JudgedDocument:
    extra = row.get("extra")
    if isinstance(extra, str):
        extra = json.loads(extra)
    if isinstance(extra, Mapping):
        source, reference, context = extra, "reference_answer", "context"
    else:
        source, reference, context = row, _STOCK_REFERENCE.get(column, "gpt_answer"), "caption"
    for key in ("question", reference, context, "category"):
        if source.get(key) is None:
            raise EvaluationError(
                f"task {task}, document {doc_id} has no {key!r}, which its judge has to read.",
                "Check the data set: see docs/judging.md for what a judged document holds.",
            )
    words = source[context]
    category = str(source["category"])
    return JudgedDocument(
        doc_id=doc_id,
        question=str(source["question"]),
        reference_answer=str(source[reference]),
        context="\n".join(words) if isinstance(words, list | tuple) else str(words),
        category=category,
        rule=_rule(column, protocol, category),
    )


def _rule(column: str, protocol: str, category: str) -> str:
    # LLaVA judges COCO with captions and boxes, by a text that explains boxes; lmms-eval sends
    # captions alone for both, by the text that was written for the wild questions.
    describes_boxes = column == "llava-coco" and protocol != "lmms-eval"
    return category if describes_boxes else _PREFIX + category


def _parse(content: bytes) -> dict[str, dict[str, str]]:
    parsed: dict[str, dict[str, str]] = json.loads(content)
    return parsed
