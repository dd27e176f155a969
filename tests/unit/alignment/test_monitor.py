"""Held-out measurements on schedule, the best of them, and ending a run early."""

import json

import pytest
from transformers import TrainerControl, TrainerState

from kuea_mllm.alignment.monitor import EarlyStop, Measure
from kuea_mllm.config.align import EarlyStopConfig
from kuea_mllm.errors import RecipeError


def run(
    gaps,
    *,
    every=10,
    start=0,
    stop_at=None,
    kill_at=None,
    config=None,
    saved=None,
    is_zero=True,
    **extra,
):
    """Walk through the steps of a run whose measurements are given one after the other."""
    log, best, given = [], [], iter(gaps)
    steps = every * (len(gaps) - 1) if stop_at is None else stop_at
    state = TrainerState(global_step=start, max_steps=steps, is_world_process_zero=is_zero)
    control = TrainerControl()
    measure = Measure(
        lambda: {"heldout_kernel_gap": next(given), **{k: next(v) for k, v in extra.items()}},
        every=every,
        on_best=best.append,
    )
    measure.bind(lambda row: log.append((state.global_step, row)))
    callbacks = [measure]
    if config is not None:
        callbacks.append(EarlyStop(config, measure))
    for callback, content in zip(callbacks, saved or [], strict=False):
        callback.load_state_dict(json.loads(json.dumps(content)))
    for callback in callbacks:
        callback.on_train_begin(None, state, control)
    while state.global_step < (kill_at or steps) and not control.should_training_stop:
        state.global_step += 1
        for callback in callbacks:
            callback.on_step_end(None, state, control)
    return callbacks, log, best, state


def test_measured_at_the_start_on_schedule_and_at_the_last_step():
    _, log, _, _ = run([4, 3, 2, 1], every=10, stop_at=25)
    assert [step for step, _ in log] == [0, 10, 20, 25]


def test_best_is_called_for_every_new_lowest_gap_but_not_for_the_untouched_tower():
    (measure,), _, best, _ = run([4, 3, 5, 2, 2])
    assert best == [10, 30]
    assert (measure.best_step, measure.best) == (30, {"heldout_kernel_gap": 2})
    assert measure.first == {"heldout_kernel_gap": 4}


def test_run_that_never_improves_has_no_best():
    (measure,), _, best, _ = run([4, 5, 6])
    assert best == []
    assert measure.best_step == 0


def test_measurement_that_ends_the_run_is_not_taken_for_the_best():
    def refuse(row):
        if row["heldout_kernel_gap"] < 0:
            raise ArithmeticError

    best = []
    values = iter([1.0, -1.0])
    measure = Measure(lambda: {"heldout_kernel_gap": next(values)}, every=1, on_best=best.append)
    measure.bind(refuse)
    state = TrainerState(max_steps=5)
    measure.on_train_begin(None, state, TrainerControl())
    state.global_step = 1
    with pytest.raises(ArithmeticError):
        measure.on_step_end(None, state, TrainerControl())
    assert best == []
    assert measure.best == {"heldout_kernel_gap": 1.0}


def test_resumed_run_measures_and_remembers_as_if_never_interrupted():
    config = EarlyStopConfig(patience=3)
    gaps = [4, 3, 5, 2, 6, 7, 8, 9]
    whole, whole_log, whole_best, end = run(gaps, config=config, stop_at=100)
    early, early_log, early_best, _ = run(gaps[:5], config=config, stop_at=100, kill_at=43)
    late, late_log, late_best, late_end = run(
        gaps[5:],
        start=43,
        config=config,
        stop_at=100,
        saved=[callback.state_dict() for callback in early],
    )
    assert early_log + late_log == whole_log
    assert early_best + late_best == whole_best
    assert [c.state_dict() for c in late] == [c.state_dict() for c in whole]
    assert late[1].reason == whole[1].reason
    assert end.global_step == late_end.global_step == 60


def test_other_processes_neither_measure_nor_fail():
    callbacks, log, best, state = run([], stop_at=20, config=EarlyStopConfig(), is_zero=False)
    assert log == best == []
    assert state.global_step == 20
    assert callbacks[1].reason is None


def test_other_processes_stop_when_process_zero_does():
    measure = Measure(dict, every=5)
    stop = EarlyStop(EarlyStopConfig(), measure, agree=lambda wish: True)
    state = TrainerState(global_step=4, max_steps=20, is_world_process_zero=False)
    control = TrainerControl()
    stop.on_step_end(None, state, control)
    assert not control.should_training_stop
    state.global_step = 5
    stop.on_step_end(None, state, control)
    assert control.should_training_stop


def test_stops_after_as_many_misses_as_patience_allows(caplog):
    with caplog.at_level("WARNING", logger="kuea_mllm"):
        (_, stop), _, _, state = run(
            [4, 3, 3.5, 3.2, 3.1, 1], config=EarlyStopConfig(patience=3), stop_at=100
        )
    assert state.global_step == 40
    assert stop.reason == (
        "heldout_kernel_gap has not improved for 3 measurements (best 3 at step 10)"
    )
    assert "stopped early at step 40 of 100" in caplog.text


def test_improvement_smaller_than_the_least_that_counts_is_none():
    config = EarlyStopConfig(patience=2, min_delta=0.5)
    (_, stop), _, _, state = run([4, 3.8, 3.6, 1], config=config, stop_at=100)
    assert (state.global_step, stop.reason is None) == (20, False)


def test_measurement_for_which_higher_is_better_may_rise():
    config = EarlyStopConfig(metric="heldout_zero_shot", patience=2)
    scores = [0.1, 0.2, 0.3, 0.25, 0.28, 0.9]
    (_, stop), _, _, state = run(
        [1] * 6, config=config, stop_at=100, heldout_zero_shot=iter(scores)
    )
    assert state.global_step == 40
    assert "best 0.3 at step 20" in stop.reason


def test_stops_when_the_bound_on_drift_is_exceeded():
    config = EarlyStopConfig(max_drift_bound=0.5)
    bounds = iter([0.0, 0.4, 0.6, 0.7])
    (_, stop), _, _, state = run(
        [4, 3, 2, 1], config=config, stop_at=100, heldout_drift_bound_mean=bounds
    )
    assert state.global_step == 20
    assert stop.reason == (
        "heldout_drift_bound_mean is 0.6, above monitor.early_stop.max_drift_bound 0.5"
    )


def test_run_that_improves_to_the_end_is_not_stopped():
    (_, stop), _, _, state = run([4, 3, 2, 1], config=EarlyStopConfig(patience=1))
    assert (state.global_step, stop.reason) == (30, None)


def test_last_step_is_the_end_and_no_early_stop():
    (_, stop), _, _, _ = run([4, 5], config=EarlyStopConfig(patience=1))
    assert stop.reason is None


def test_unknown_measurement_is_refused_before_training():
    config = EarlyStopConfig(metric="heldout_zero_shot")
    with pytest.raises(RecipeError) as caught:
        run([4, 3], config=config)
    assert "'monitor.early_stop.metric' watches 'heldout_zero_shot'" in caught.value.problem
    assert "heldout_kernel_gap" in caught.value.remedy


def test_wrong_order_of_callbacks_is_a_clear_error():
    measure = Measure(lambda: {"heldout_kernel_gap": 1.0}, every=1)
    stop = EarlyStop(EarlyStopConfig(), measure)
    state = TrainerState(max_steps=5)
    measure.on_train_begin(None, state, TrainerControl())
    state.global_step = 1
    with pytest.raises(ValueError, match="after Measure"):
        stop.on_step_end(None, state, TrainerControl())
