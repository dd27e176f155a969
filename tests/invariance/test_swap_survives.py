"""Whatever ends a swap early: the base is untouched, and no model that looks finished is wrong."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("hurt_swaps.py")
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    done = subprocess.run(
        [sys.executable, PROGRAM, tmp_path_factory.mktemp("swaps"), "0"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_nothing_is_wrong(rounds):
    for each in rounds:
        assert each["base_is_untouched"], each
        # Complete, that is equal to what an undisturbed swap writes, or not there at all.
        assert each["out"] in {"absent", "one"}, each


def assert_nothing_is_left(rounds):
    assert_nothing_is_wrong(rounds)
    assert all(each["out"] == "absent" and not each["leftovers"] for each in rounds), rounds


@pytest.mark.parametrize("how", ["killed_at_every_step", "killed_between_steps"])
def test_killed_swaps_leave_a_whole_model_or_none(seen, how):
    rounds = seen[how]["rounds"]
    assert_nothing_is_wrong(rounds)
    assert sum(each["exit"] == KILLED for each in rounds) >= 6
    # The kills landed inside: files had been written, the model had no name yet.
    before = [0, *(len(each["leftovers"]) for each in rounds)]
    inside = [
        each
        for each, earlier in zip(rounds, before, strict=False)
        if each["exit"] == KILLED and len(each["leftovers"]) > earlier
    ]
    assert len(inside) >= 3
    assert all(each["out"] == "absent" for each in inside)


def test_every_file_operation_was_one_to_be_killed_at(seen):
    rounds = seen["killed_at_every_step"]["rounds"]
    assert len(rounds) >= 15
    assert all(each["exit"] == KILLED for each in rounds)


@pytest.mark.parametrize("how", ["killed_at_every_step", "killed_between_steps"])
def test_swap_works_where_others_were_killed_and_removes_what_they_left(seen, how):
    last, again = seen[how]["rounds"][-1], seen[how]["again"]
    assert (again["exit"], again["out"], again["base_is_untouched"]) == (0, "one", True)
    assert again["leftovers"] == []
    # Named when it is removed; lines are wrapped.
    said = "".join(again["said"].split())
    assert last["leftovers"]
    assert all(name in said for name in last["leftovers"])


def test_interrupted_swap_leaves_nothing(seen):
    assert_nothing_is_left(seen["asked_to_end"])
    assert [each["exit"] for each in seen["asked_to_end"]] == [130, 143, 130, 143]


def test_full_disk_is_named_and_leaves_nothing(seen):
    assert len(seen["out_of_disk"]) == 4
    assert_nothing_is_left(seen["out_of_disk"])
    for each in seen["out_of_disk"]:
        assert each["exit"] == 1
        assert "no space left on device while writing" in each["said"]
        assert "Traceback" not in each["said"]


def test_small_file_system_takes_all_or_nothing(seen):
    if seen["small_file_system"] is None:
        pytest.skip("mounting is not permitted here")
    *too_small, large_enough = seen["small_file_system"]
    assert_nothing_is_left(too_small)
    assert all(each["exit"] == 1 for each in too_small)
    assert all("no space left on device" in each["said"] for each in too_small)
    # Another file system, so everything is copied.
    assert (large_enough["exit"], large_enough["out"]) == (0, "one")


def test_read_only_target_is_refused(seen):
    target = seen["read_only_target"]
    assert_nothing_is_left([target])
    assert target["exit"] == 2
    assert "not writable" in target["said"]


def test_read_only_base_is_enough(seen):
    base = seen["read_only_base"]
    assert (base["exit"], base["out"], base["leftovers"]) == (0, "one", [])
    assert base["base_is_untouched"]


def test_of_two_swaps_at_once_one_wins_whole(seen):
    race = seen["two_at_once"]
    assert race["met"] == 2
    assert sorted(race["exits"]) == [0, 2]
    winner = race["exits"].index(0)
    assert race["out"] == ("one", "two")[winner]
    assert not race["leftovers"]
    assert race["base_is_untouched"]
    assert "was created by another process meanwhile" in race["said"][1 - winner]


def test_swap_that_is_still_at_work_is_left_alone(seen):
    beside = seen["live_one_beside"]
    assert beside["is_untouched"]
    assert beside["out"] == beside["left"]["out"] == "one"
    assert beside["exits"] == [0, 2]
    assert "was created by another process meanwhile" in beside["said"]
    assert not beside["left"]["leftovers"]


def test_files_of_somebody_else_are_kept(seen):
    intruded = seen["somebody_elses_files"]
    assert intruded["exit"] == 2
    assert intruded["kept"] == ["mine.txt"]
    assert not intruded["leftovers"]
