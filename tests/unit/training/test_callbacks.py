"""Metrics on disk, health checks and the progress bar, without a trainer around them."""

import json
import math

import pytest
from transformers import TrainerControl, TrainerState

from kuea_mllm.errors import TrainingDiverged, UserError
from kuea_mllm.training import callbacks
from kuea_mllm.training.callbacks import (
    MetricsFile,
    StopWhenDiverged,
    TrainingProgress,
    keep_rows,
)


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(callbacks.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def open_metrics(tmp_path):
    opened = []

    def open_one(**settings):
        opened.append(MetricsFile(tmp_path / "m", batch_size=8, **settings))
        return opened[-1]

    yield open_one
    for metrics in opened:
        metrics.close()


def state_at(step, *, is_zero=True, max_steps=100):
    return TrainerState(global_step=step, max_steps=max_steps, is_world_process_zero=is_zero)


def log(callback, step, logs, **state):
    callback.on_log(None, state_at(step, **state), TrainerControl(), logs=logs)


def begin(callback, step=0, **state):
    callback.on_train_begin(None, state_at(step, **state), TrainerControl())


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rate_is_of_the_images_since_the_last_row(open_metrics, tmp_path, clock):
    metrics = open_metrics()
    begin(metrics)
    clock.now += 2
    log(metrics, 1, {"loss": 0.5})
    clock.now += 1
    log(metrics, 6, {"loss": 0.4})
    assert [row["images_per_second"] for row in rows_of(tmp_path / "m")] == [4.0, 40.0]
    assert metrics.per_second == 40.0


def test_rate_leaves_out_time_spent_on_measuring(open_metrics, tmp_path, clock):
    idle = [0.0]
    metrics = open_metrics(idle_seconds=lambda: idle[0])
    begin(metrics)
    clock.now += 5
    idle[0] = 4.0
    log(metrics, 1, {"loss": 0.5})
    assert metrics.per_second == 8.0


def test_rate_of_a_resumed_run_counts_its_own_steps_only(open_metrics, tmp_path, clock):
    (tmp_path / "m").write_text('{"step": 50, "loss": 1.0}\n')
    metrics = open_metrics(resume_step=50)
    begin(metrics, 50)
    clock.now += 1
    log(metrics, 52, {"loss": 0.5})
    assert [row["step"] for row in rows_of(tmp_path / "m")] == [50, 52]
    assert metrics.per_second == 16.0


@pytest.mark.parametrize(("peak", "expected"), [(None, None), (1000.0, 0.08)])
def test_utilisation_is_written_where_the_peak_is_known(
    open_metrics, tmp_path, clock, peak, expected
):
    metrics = open_metrics(flops_per_item=10.0, peak_flops=peak)
    begin(metrics)
    clock.now += 1
    log(metrics, 1, {"loss": 0.5})
    assert rows_of(tmp_path / "m")[0].get("mfu") == expected


def test_summaries_of_the_stock_trainer_are_left_out(open_metrics, tmp_path):
    metrics = open_metrics()
    log(metrics, 3, {"train_runtime": 1.0, "total_flos": 0.0, "epoch": 1.0})
    log(metrics, 3, {"heldout_kernel_gap": 0.5})
    assert rows_of(tmp_path / "m") == [{"step": 3, "heldout_kernel_gap": 0.5}]


def test_only_process_zero_writes(open_metrics, tmp_path):
    (tmp_path / "m").write_text("not to be touched")
    metrics = open_metrics()
    begin(metrics, is_zero=False)
    log(metrics, 1, {"loss": 0.5}, is_zero=False)
    assert (tmp_path / "m").read_text() == "not to be touched"


def test_a_new_run_starts_a_new_file_and_a_late_row_does_not_empty_it(open_metrics, tmp_path):
    (tmp_path / "m").write_text('{"step": 9}\n')
    metrics = open_metrics()
    begin(metrics)
    log(metrics, 1, {"loss": 0.5})
    metrics.close()
    log(metrics, 2, {"loss": 0.4})
    metrics.close()
    assert [row["step"] for row in rows_of(tmp_path / "m")] == [1, 2]


def test_rows_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {step}}}\n' for step in (0, 5, 10, 10, 15)]
    # A kill in the middle of a write leaves half a line.
    path.write_text("".join(lines) + '{"step": 2')
    keep_rows(path, up_to=10)
    assert path.read_text() == "".join(lines[:4])
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_metrics_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"line 2 of .*metrics\.jsonl"):
        keep_rows(path, up_to=10)
    assert "rubbish" in path.read_text()


def test_missing_metrics_of_a_resumed_run_are_said(tmp_path, caplog):
    with caplog.at_level("WARNING", logger="kuea_mllm"):
        keep_rows(tmp_path / "metrics.jsonl", up_to=10)
    assert "metrics.jsonl is missing" in caplog.text


@pytest.mark.parametrize("name", ["loss", "loss_preserve", "heldout_kernel_gap"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_end_the_run(name, value):
    with pytest.raises(TrainingDiverged, match=f"{name} is {value} at step 7"):
        log(StopWhenDiverged(remedy="Lower it."), 7, {"lr": 1.0, name: value})


def test_healthy_rows_and_other_columns_pass():
    log(StopWhenDiverged(remedy="Lower it."), 7, {"loss": 1.0, "grad_norm": math.inf})


def test_a_term_is_named_rather_than_the_total_it_spoilt():
    with pytest.raises(TrainingDiverged, match=r"^loss_kernel is nan"):
        log(StopWhenDiverged(remedy="Lower it."), 7, {"loss": math.nan, "loss_kernel": math.nan})


def test_divergence_names_batch_and_last_good_checkpoint():
    stop = StopWhenDiverged(remedy="Lower it.")
    stop.bind(
        explain=lambda: "loss_kernel is nan at step 5, images 3, 8", last_good=lambda: "out/5"
    )
    with pytest.raises(TrainingDiverged) as caught:
        log(stop, 7, {"loss": math.nan})
    assert caught.value.problem.endswith("First seen: loss_kernel is nan at step 5, images 3, 8.")
    assert caught.value.remedy.endswith("The last good checkpoint is out/5.")


def test_kernel_that_lost_its_meaning_names_the_step_and_the_checkpoint():
    def check():
        raise TrainingDiverged("rho became nan.", "Lower the rate.")

    with pytest.raises(TrainingDiverged) as caught:
        log(StopWhenDiverged(check, remedy="", last_good=lambda: "out/5"), 7, {"loss": 1.0})
    assert caught.value.problem == "at step 7 rho became nan."
    assert caught.value.remedy == "Lower the rate. The last good checkpoint is out/5."


def test_progress_of_a_resumed_run_starts_where_it_stopped():
    progress = TrainingProgress("align", rate=lambda: 123.4)
    begin(progress, 40, max_steps=50)
    bar = progress._bar
    assert (bar.n, bar.initial, bar.total) == (40, 40, 50)
    progress.on_step_end(None, state_at(41), TrainerControl())
    log(progress, 41, {"loss": 1.0, "loss_kernel": 0.25})
    assert bar.n == 41
    assert "kernel=0.25" in bar.postfix
    assert "img/s=123" in bar.postfix
    progress.on_train_end(None, state_at(41), TrainerControl())


def test_progress_is_shown_by_process_zero_only():
    progress = TrainingProgress("align")
    begin(progress, is_zero=False)
    progress.on_step_end(None, state_at(1), TrainerControl())
    log(progress, 1, {"loss_kernel": 0.25})
    progress.on_train_end(None, state_at(1), TrainerControl())
    assert progress._bar is None


def test_closed_bar_ends_its_line_and_takes_no_notice_of_what_follows(capsys):
    progress = TrainingProgress("align")
    begin(progress, max_steps=50)
    progress.close()
    assert capsys.readouterr().err.endswith("\n")
    progress.on_step_end(None, state_at(1), TrainerControl())
    log(progress, 1, {"loss_kernel": 0.25})
    progress.on_train_end(None, state_at(1), TrainerControl())
    assert capsys.readouterr().err == ""
