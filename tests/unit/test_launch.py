"""Which of several processes is heard, and what is said about the others."""

import json
import signal
from dataclasses import asdict

import pytest

from kuea_mllm import launch
from kuea_mllm.errors import UserError
from kuea_mllm.launch import (
    REPORTS_VARIABLE,
    TIMEOUT_VARIABLE,
    FailedElsewhere,
    Report,
    has_parent,
    is_launched_by_torchrun,
    launched_rank,
    launched_world_size,
    lost_another,
    read_reports,
    report_failure,
    timeout_minutes,
)

RESUME = "Go on with: kuea-mllm align --resume"


@pytest.fixture
def group(monkeypatch):
    """Be process 1 of 2."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def judge(tmp_path, reports=(), exit_codes=None, stopped_by=None):
    return launch._judge(
        list(reports), exit_codes or {}, stopped_by, resume=RESUME, folder=tmp_path
    )


def told(rank, message, code=2, *, is_echo=False, time=100.0):
    return Report(rank, message, code, is_echo, time)


def test_process_of_its_own_has_rank_zero(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    # Some schedulers set it for single processes, too.
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (launched_rank(), launched_world_size()) == (0, 1)
    assert not is_launched_by_torchrun()


def test_launched_process_knows_its_rank_and_its_launcher(group, monkeypatch, tmp_path):
    monkeypatch.delenv(REPORTS_VARIABLE, raising=False)
    assert (launched_rank(), launched_world_size()) == (1, 2)
    assert is_launched_by_torchrun()
    monkeypatch.setenv(REPORTS_VARIABLE, str(tmp_path))
    assert has_parent()
    assert not is_launched_by_torchrun()


def test_reports_come_back_in_order_of_time(group, monkeypatch, tmp_path):
    monkeypatch.setenv(REPORTS_VARIABLE, str(tmp_path))
    report_failure("late", exit_code=2, is_echo=False)
    early = told(0, "early", time=1.0)
    (tmp_path / "rank-0.json").write_text(json.dumps(asdict(early)))
    found = read_reports(tmp_path)
    assert [report.message for report in found] == ["early", "late"]
    assert found[0] == early
    assert (found[1].rank, found[1].exit_code) == (1, 2)


@pytest.mark.parametrize("text", ["0", "-1", "soon", ""])
def test_timeout_that_is_no_time_is_refused(monkeypatch, text):
    monkeypatch.setenv(TIMEOUT_VARIABLE, text)
    with pytest.raises(UserError, match=TIMEOUT_VARIABLE):
        timeout_minutes()


def test_timeout_can_be_set(monkeypatch):
    monkeypatch.delenv(TIMEOUT_VARIABLE, raising=False)
    assert timeout_minutes() == 10
    monkeypatch.setenv(TIMEOUT_VARIABLE, "0.5")
    assert timeout_minutes() == 0.5


def test_lost_connection_is_told_from_other_errors(group):
    gloo = "[../third_party/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]"
    assert lost_another(RuntimeError(gloo))
    assert not lost_another(RuntimeError("CUDA out of memory"))


def test_process_of_its_own_loses_no_other(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert not lost_another(RuntimeError("Connection reset by peer"))


def test_failure_elsewhere_keeps_words_and_exit_code():
    error = FailedElsewhere(1, "it broke.", "Mend it.", 2)
    assert str(error) == "it broke.\n  Mend it."
    assert (error.rank, error.exit_code) == (1, 2)


def test_success_says_nothing(tmp_path):
    assert judge(tmp_path) == launch.Outcome(0)


def test_error_that_all_processes_meet_is_said_once(tmp_path):
    reports = [told(0, "no images."), told(1, "no images.", time=100.5)]
    found = judge(tmp_path, reports, {0: (2, 101), 1: (2, 101)})
    assert found == launch.Outcome(2, "no images.")


def test_error_of_another_process_names_it(tmp_path):
    reports = [told(1, "bad.jpg cannot be read.", 1), told(0, "lost 1", 1, is_echo=True, time=99.0)]
    found = judge(tmp_path, reports, {1: (1, 100), 0: (1, 100)})
    assert found == launch.Outcome(1, "process 1: bad.jpg cannot be read.")


def test_killed_process_is_named_with_signal_and_resume_command(tmp_path):
    # The survivor noticed before the launcher did, and was ended by SIGTERM.
    reports = [told(0, "lost a process", 1, is_echo=True, time=99.0)]
    exit_codes = {0: (-signal.SIGTERM, 101), 1: (-signal.SIGKILL, 100)}
    found = judge(tmp_path, reports, exit_codes)
    assert found.exit_code == 1
    assert "process 1 was killed by SIGKILL" in found.message
    assert RESUME in found.message
    assert "lost a process" not in found.message


def test_crash_names_where_the_output_is(tmp_path):
    found = judge(tmp_path, (), {1: (-signal.SIGSEGV, 100)})
    assert "process 1 was killed by SIGSEGV" in found.message
    assert str(tmp_path) in found.message


def test_survivor_that_had_to_be_killed_is_not_blamed(tmp_path):
    reports = [told(1, "disk full.", 1, time=100.0)]
    found = judge(tmp_path, reports, {1: (1, 100), 0: (-signal.SIGKILL, 131)})
    assert found == launch.Outcome(1, "process 1: disk full.")


def test_silent_group_names_output_and_resume_command(tmp_path):
    reports = [told(0, "process 0 lost another process", 1, is_echo=True)]
    found = judge(tmp_path, reports, {0: (1, 100), 1: (-signal.SIGTERM, 101)})
    assert "process 0 lost another process" in found.message
    assert str(tmp_path) in found.message
    assert RESUME in found.message


def test_exit_without_report_is_named(tmp_path):
    found = judge(tmp_path, (), {1: (3, 100)})
    assert "process 1 ended with exit code 3" in found.message


def test_signal_to_the_parent_lets_process_zero_speak(tmp_path):
    reports = [
        told(1, "interrupted.", 143),
        told(0, "interrupted at step 7; go on", 143, time=101.0),
    ]
    found = judge(tmp_path, reports, stopped_by=signal.SIGTERM)
    assert found == launch.Outcome(143, "interrupted at step 7; go on")
    unheard = judge(tmp_path, stopped_by=signal.SIGINT)
    assert unheard.exit_code == 130
    assert RESUME in unheard.message
