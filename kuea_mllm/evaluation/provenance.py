"""What a summary says about the model that was scored and about how it was run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kuea_mllm.adapters.records import read_record
from kuea_mllm.evaluation.answering.session import Session
from kuea_mllm.evaluation.fewshot.trials import summarise_trials
from kuea_mllm.evaluation.lmms.backend_session import BackendSession
from kuea_mllm.evaluation.lmms.backends import Backend

if TYPE_CHECKING:
    from kuea_mllm.adapters.base import MLLMAdapter
    from kuea_mllm.config.evaluate import FewShotSettings
    from kuea_mllm.evaluation.fewshot.task_files import FewShotTask


def describe_subject(
    model_dir: Path, subject: MLLMAdapter | Backend, session: Session | BackendSession
) -> dict[str, Any]:
    """Say which model was scored, as far as what opened it shows."""
    if isinstance(session, BackendSession):
        return session.describe_model()
    name = "" if isinstance(subject, Backend) else subject.name
    return describe_model(model_dir, name, session.fingerprint)


def describe_runtime(session: Session | BackendSession) -> dict[str, Any]:
    """Say what answered: number format, decoding, classes."""
    if isinstance(session, BackendSession):
        return session.describe()
    return dict(session.runtime.describe())


def describe_fewshot(
    tasks: Sequence[FewShotTask],
    columns: Mapping[str, Mapping[str, Any]],
    settings: FewShotSettings,
) -> dict[str, Any]:
    """Say how few-shot tasks were run, with mean and spread over their trials."""
    return {
        "compat": settings.compat,
        "demonstrations": "random" if settings.retrieval is None else "retrieved",
        "length_penalty": settings.length_penalty,
        "trials": summarise_trials(
            tasks, {name: column["entry"] for name, column in columns.items()}
        ),
        "images_encoded": sum(column["images_encoded"] for column in columns.values()),
        "images_reused": sum(column["images_reused"] for column in columns.values()),
    }


def describe_model(model_dir: Path, adapter: str, fingerprint: str) -> dict[str, Any]:
    """Say which model was scored; `tower` is what `swap` recorded about its vision tower."""
    tower = read_record(model_dir).get("tower")
    if isinstance(tower, dict):
        tower = {key: value for key, value in tower.items() if isinstance(value, str | int | float)}
    elif isinstance(tower, str):
        tower = {"source": tower}
    else:
        tower = None
    return {
        "path": str(model_dir),
        "name": model_dir.resolve().name,
        "adapter": adapter,
        "tower_fingerprint": fingerprint,
        "tower": tower,
    }


def describe_making(model_dir: Path) -> dict[str, Any]:
    """Return what `kuea.json` says about the model's making, for reports; empty without one."""
    record = read_record(model_dir) if model_dir.is_dir() else {}
    return {key: value for key, value in record.items() if key not in ("base_card", "history")}
