"""What is evaluated, and how: all that the `eval` command was told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kuea_mllm.errors import EvaluationError
from kuea_mllm.evaluation.suites.subset import limit_rule

if TYPE_CHECKING:
    from kuea_mllm.config.evaluate import FewShotSettings, JudgeSettings, SuiteSettings
    from kuea_mllm.evaluation.answering.opening import Placement
    from kuea_mllm.evaluation.jobs import Wishes


@dataclass(frozen=True)
class Request:
    """The arguments of `runner.evaluate`, which says what they mean."""

    model_dir: Path
    tasks: Sequence[str]
    out: Path
    adapter: str | None
    batch_size: int
    limit: int | None
    limit_seed: int | None
    dtype: str
    device: str | None
    seed: int
    max_failures: int
    thumbnails: int
    command: str | None
    show_progress: bool
    recipe: str | None
    suite: SuiteSettings | None
    fewshot: FewShotSettings | None
    data: Mapping[str, str]
    data_root: str | None
    judge: JudgeSettings | None
    backend: str
    backend_args: Mapping[str, str]
    shared_prefix: bool
    resume: bool
    restart: bool
    same_as: Path | None

    def require_counts(self) -> None:
        """Refuse numbers that lmms-eval would read as something else.

        Raises:
            EvaluationError: Naming the number.
        """
        for flag, value, least in (
            ("batch_size", self.batch_size, 1),
            ("limit", 1 if self.limit is None else self.limit, 1),
            ("max_failures", self.max_failures, 0),
            ("thumbnails", self.thumbnails, 0),
        ):
            # lmms-eval reads limit 0 as "all documents" and fractions as a share of the first task.
            if not isinstance(value, int) or value < least:
                raise EvaluationError(
                    f"{flag} is {value!r}, a whole number of at least {least} was expected."
                )

    def identity(self, wishes: Wishes, adapter: str | None, placement: Placement) -> dict[str, Any]:
        """Return what a resumed evaluation has to have in common, by the keys of recipes.

        Args:
            wishes: The tasks.
            adapter: Name of the adapter that opens the model; None for another backend.
            placement: Where it runs.
        """
        return {
            "adapter": adapter,
            "backend": self.backend,
            "backend_args": dict(self.backend_args),
            "tasks": wishes.describe_tasks(),
            "batch_size": self.batch_size,
            "limit": self.limit,
            "limit_seed": self.limit_seed,
            "dtype": placement.dtype,
            "device": placement.device,
            "seed": self.seed,
            "max_failures": self.max_failures,
            "thumbnails": self.thumbnails,
            "suite": None if self.suite is None else self.suite.model_dump(mode="json"),
            "fewshot": None if self.fewshot is None else self.fewshot.model_dump(mode="json"),
            "data": dict(self.data),
            "data_root": self.data_root,
            "judge": None if self.judge is None else self.judge.model_dump(mode="json"),
            "shared_prefix": self.shared_prefix,
        }

    def asked(self) -> dict[str, Any]:
        """Return what a summary says about the questions."""
        return {
            "batch_size": self.batch_size,
            "limit": self.limit,
            "limit_seed": self.limit_seed,
            "limit_rule": limit_rule(self.limit_seed),
            "suite": None if self.suite is None else self.suite.name,
            "protocol": None if self.suite is None else self.suite.protocol,
        }
