"""lmms-eval's log: whole in the file, to the point on the terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from kuea_mllm.evaluation.lmms.loguru_bridge import lmms_log

GROUP = "A task YAML file was found to contain a `group` key. Groups which provide scores..."


def test_warnings_are_passed_on_once_and_errors_always(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from loguru import logger

    path = tmp_path / "lmms_eval.log"
    said = [("WARNING", "slow"), ("ERROR", "lost"), ("INFO", "begun")]
    with lmms_log(path):
        for level, text in [*said, *said]:
            logger.log(level, text)
    assert caplog.messages == ["lmms-eval: slow", "lmms-eval: lost", "lmms-eval: lost"]
    assert path.read_text().count("slow") == 2
    caplog.clear()
    # Another evaluation of the same process.
    with lmms_log(path):
        logger.warning("slow")
    assert caplog.messages == ["lmms-eval: slow"]


def test_remark_on_the_format_of_task_files_is_only_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from loguru import logger

    with lmms_log(tmp_path / "lmms_eval.log"):
        logger.warning(GROUP)
    assert caplog.messages == []
    assert GROUP in (tmp_path / "lmms_eval.log").read_text()
