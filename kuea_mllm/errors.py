"""Errors that name what is wrong and what to do about it.

Two families, told apart by the exit code of the command line: a mistake that the user can correct
(`UserError`, exit code 2) and a failure of the world around the program (`EnvironmentFailure`,
exit code 1). The command line prints the message as one clear line; the traceback only appears
with `--debug`.
"""

from __future__ import annotations


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM); takes the same way out as Ctrl-C."""


class KueaError(Exception):
    """Base of every error that is shown as a line instead of a traceback.

    Args:
        problem: What was found and what was expected; names the file, key or tensor.
        remedy: What to do about it.
    """

    exit_code = 1

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem if not remedy else f"{problem}\n  {remedy}")
        self.problem = problem
        self.remedy = remedy


class UserError(KueaError):
    """The request cannot be carried out as it was made."""

    exit_code = 2


class EnvironmentFailure(KueaError):
    """The request was fine, the world was not: disk full, out of memory, interrupted."""

    exit_code = 1


class RecipeError(UserError):
    """A recipe holds an unknown key, a wrong type or an impossible combination."""


class OutputError(UserError):
    """The place to write to exists already or cannot be written."""


class DataError(UserError):
    """Images or data sets are missing or empty."""


class UnreadableImage(EnvironmentFailure):
    """An image file is damaged, cut short or of an unknown format."""


class TowerError(UserError):
    """A file or directory cannot be read as a vision tower."""


class TowerMismatch(UserError):
    """A tower does not fit the place it is meant for."""


class TrainingDiverged(EnvironmentFailure):
    """A loss or a kernel parameter left the range in which training makes sense."""


class Interrupted(KueaError):
    """A run ended because it was asked to; what it did so far is saved.

    Args:
        problem: How far it got, and how to go on.
        remedy: What to do about it.
        exit_code: As a shell reports it: 128 and the number of the signal.
    """

    def __init__(self, problem: str, remedy: str = "", *, exit_code: int = 130) -> None:
        super().__init__(problem, remedy)
        self.exit_code = exit_code


class EvaluationError(UserError):
    """A task, a result or a comparison is not what it has to be."""
