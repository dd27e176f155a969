"""All answers of a column: kept from an earlier sitting, given here or in other processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kuea_mllm.adapters.base import ChoosingRuntime
from kuea_mllm.errors import EvaluationError
from kuea_mllm.evaluation.answering.generation import Answerer, OwnPicture, one_line
from kuea_mllm.evaluation.answering.preparing import strict_image_files
from kuea_mllm.evaluation.answering.processes import (
    AnsweredElsewhereError,
    exchange,
    fail_together,
    from_zero,
    process_count,
    process_number,
    share_out,
)
from kuea_mllm.evaluation.answering.questions import PendingQuestion
from kuea_mllm.evaluation.answering.session import Session
from kuea_mllm.log import LOGGER


def answer_questions(
    session: Session, batch_size: int, questions: Sequence[PendingQuestion]
) -> list[str]:
    """Answer the questions of a column, together with the other processes if there are any.

    Returns:
        One answer per question, in the order given; only in process zero.

    Raises:
        UserError: If the model cannot answer in the way that is asked for.
        EnvironmentFailure: If the first questions all fail.
        AnsweredElsewhereError: In other processes, when their share is done.
    """
    require_choices(
        session, {q.settings.candidates: q.task for q in questions if q.settings.candidates}
    )
    journal, own = session.journal, process_number()
    with fail_together():
        known = journal.known_answers(questions) if journal is not None and not own else {}
    missing = [place for place in range(len(questions)) if place not in known]
    share = from_zero(share_out(questions, missing))[own]
    if known:
        LOGGER.info("Answers of an earlier sitting: %d of %d.", len(known), len(questions))

    def keep(answers: Mapping[int, str]) -> None:
        if journal is not None:
            pairs = [(questions[share[place]], answer) for place, answer in answers.items()]
            journal.write(pairs, process=own)

    with fail_together():
        answerer = Answerer(session, batch_size, keep=keep)
        mine = answerer.answer([questions[place] for place in share])
    found = exchange((dict(zip(share, mine, strict=True)), session.failures))
    if own:
        raise AnsweredElsewhereError
    if process_count() > 1:
        session.failures = [failure for _, failures in found for failure in failures]
    answers = known | {place: answer for part, _ in found for place, answer in part.items()}
    _show_others(session, [questions[place] for place in sorted(answers.keys() - set(share))])
    # lmms-eval would score missing answers as wrong ones, without a message.
    return [answers[place] for place in range(len(questions))]


def require_choices(session: Session, tasks: Mapping[tuple[str, ...], str]) -> None:
    """Make sure that the model can choose among all candidates, before any question is asked.

    Args:
        session: The model.
        tasks: A task by the candidates that it chooses among.

    Raises:
        UserError: Naming the task, or the candidate that is not a token of its own.
    """
    for candidates, task in tasks.items():
        if not isinstance(session.runtime, ChoosingRuntime):
            raise EvaluationError(
                f"task {task} chooses between {', '.join(candidates)} by the probability of the "
                "first token, which this model's adapter does not give.",
                "Let the model write its answer instead: --protocol lmms-eval.",
            )
        session.runtime.choose([], candidates)


def _show_others(session: Session, questions: Sequence[PendingQuestion]) -> None:
    """Show the images of questions that were not answered here and now."""
    for question in questions:
        if session.on_images is None or question.doc_id >= session.shown:
            continue
        try:
            with strict_image_files():
                images = tuple(question.load_images() or ())
                if question.settings.completes:
                    images = tuple(OwnPicture(images))
                shown = [image.convert("RGB") for image in images]
        # Of any data set. Where the question was answered, the same was reported as its failure.
        except Exception as error:
            line = one_line(error)
            LOGGER.debug("No picture of %s, document %d: %s", question.task, question.doc_id, line)
            continue
        session.on_images(question.task, question.doc_id, shown)
