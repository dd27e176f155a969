"""CIDEr over a corpus: PTB tokenisation by Java, the score by pycocoevalcap."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from kuea_mllm.errors import EnvironmentFailure, EvaluationError

_JAR = "stanford-corenlp-3.4.1.jar"
# Tokens that the caption metrics leave out.
_PUNCTUATION = "'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;"


def require_java() -> str:
    """Return the Java that tokenises captions.

    Raises:
        EvaluationError: If there is none; asked before a model is opened.
    """
    java = shutil.which("java")
    if java is None:
        raise EvaluationError(
            "captions are scored by CIDEr, whose tokenizer needs Java, and there is no `java` on "
            "the PATH.",
            "Install a Java runtime (for instance openjdk-17-jre-headless), or leave the caption "
            "data sets out: --set 'fewshot.datasets=[vqav2, textvqa]'.",
        )
    return java


def tokenise(captions: Sequence[str]) -> list[str]:
    """Split captions as the caption metrics do: lower case, no punctuation, blanks between tokens.

    Raises:
        EvaluationError: If there is no Java.
        EnvironmentFailure: If the tokenizer fails or loses a caption.
    """
    if not captions:
        return []
    # One caption per line: whatever else Java takes for the end of a line would shift all others.
    lines = [" ".join(caption.split()) for caption in captions]
    command = [require_java(), "-cp", str(_jar()), "edu.stanford.nlp.process.PTBTokenizer"]
    done = subprocess.run(
        [*command, "-preserveLines", "-lowerCase", "-encoding", "UTF-8"],
        input="\n".join(lines) + "\n",
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    found = done.stdout.split("\n")[:-1]
    if done.returncode or len(found) != len(lines):
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EnvironmentFailure(
            f"the PTB tokenizer gave {len(found)} lines for {len(lines)} captions (exit code "
            f"{done.returncode}): {reason}"
        )
    left_out = frozenset(_PUNCTUATION.split())
    return [" ".join(token for token in line.split() if token not in left_out) for line in found]


def corpus_cider(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, list[float]]:
    """Score tokenised captions; how rare a phrase is comes from the references given.

    Args:
        predictions: One caption per image.
        references: The references of each.

    Returns:
        The mean over images and the score of each, 1 being CIDEr 100.
    """
    from pycocoevalcap.cider.cider_scorer import CiderScorer  # type: ignore[import-untyped]

    scorer = CiderScorer(n=4, sigma=6.0)
    for prediction, known in zip(predictions, references, strict=True):
        scorer += (prediction, list(known))
    score, each = scorer.compute_score()
    return float(score), np.asarray(each, dtype=float).tolist()


def score_captions(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, list[float]]:
    """Tokenise captions and score them; see `corpus_cider`."""
    flat = tokenise([*predictions, *(caption for known in references for caption in known)])
    rest = iter(flat[len(predictions) :])
    tokenised = [[next(rest) for _ in known] for known in references]
    return corpus_cider(flat[: len(predictions)], tokenised)


def _jar() -> Path:
    found = find_spec("pycocoevalcap.tokenizer")
    folders = list(found.submodule_search_locations or ()) if found is not None else []
    jars = [Path(folder) / _JAR for folder in folders]
    jar = next((path for path in jars if path.is_file()), None)
    if jar is None:
        raise EnvironmentFailure(
            f"pycocoevalcap is installed without {_JAR}.", "Reinstall lmms-eval."
        )
    return jar
