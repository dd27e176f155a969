"""Which records a loss that is not finite is put down to."""

from __future__ import annotations

import pytest
import torch

from kuea_mllm.training import history
from kuea_mllm.training.history import LossHistory


def record(loss: float) -> LossHistory:
    made = LossHistory(lambda position: f"record {position}", items="records")
    made.add(3, torch.tensor([10, 11]), {"loss": torch.tensor(loss)})
    return made


def test_bad_loss_names_its_step_and_records() -> None:
    made = record(float("nan"))
    made.collect()
    assert made.first_bad == "loss is nan at step 3, records record 10, record 11"


def test_bad_loss_of_another_process_names_the_records_of_that_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As process zero sees it: its own loss is fine, the mean of both is not.
    monkeypatch.setattr(history, "mean_over_processes", lambda table: table * float("nan"))
    monkeypatch.setattr(history, "gather_objects", lambda own: [own, [27]])
    made = record(1.0)
    made.collect()
    assert made.first_bad == "loss is nan at step 3, records record 27"
