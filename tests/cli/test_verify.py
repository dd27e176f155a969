"""`kuea-mllm verify`: which tower is inside, in words and by exit code."""

import json
import shutil

import pytest
from test_swap import write_tower

from kuea_mllm.miniworld import ASSETS

BASE = ASSETS / "llava"


@pytest.fixture
def swapped(kuea, tmp_path):
    tower = write_tower(tmp_path / "tower")
    answer = kuea(
        "swap", f"--base={BASE}", f"--tower={tower}", f"--out={tmp_path / 'out'}", "--no-drift"
    )
    assert answer.code == 0, answer.err
    return tmp_path / "out"


def test_good_result_ends_with_0_and_names_its_tower(kuea, swapped, tmp_path):
    answer = kuea("verify", swapped)
    assert answer.code == 0, answer.out
    assert "as recorded" in answer.out
    found = json.loads(kuea("verify", swapped, f"--tower={tmp_path / 'tower'}", "--json").out)
    assert (found["ok"], found["is_tower"], found["dtype"]) == (True, True, "float32")
    assert found["tower"] == str(tmp_path / "tower")


def test_other_tower_ends_with_2(kuea, swapped):
    answer = kuea("verify", swapped, f"--tower={ASSETS / 'clip'}")
    assert answer.code == 2
    assert "is not" in answer.out
    assert "Traceback" not in answer.err


def test_weights_put_back_end_with_2(kuea, swapped):
    shutil.copy(BASE / "model.safetensors", swapped / "model.safetensors")
    answer = kuea("verify", swapped)
    assert answer.code == 2
    assert "was replaced" in " ".join(answer.out.split())


def test_untouched_base_needs_a_tower_to_be_compared_with(kuea):
    assert kuea("verify", BASE).code == 2
    assert kuea("verify", BASE, f"--tower={ASSETS / 'clip'}").code == 0


def test_directory_that_is_no_model_is_one_line(kuea, tmp_path):
    answer = kuea("verify", tmp_path)
    assert answer.code == 2
    assert "config.json" in answer.err


def test_evaluation_names_the_tower(swapped, caplog):
    from kuea_mllm.adapters.llava import MANIFEST
    from kuea_mllm.evaluation.answering.opening import Placement, open_session

    (swapped / "pytorch_model.bin").write_text("stale")
    with caplog.at_level("INFO", logger="kuea_mllm"):
        open_session(MANIFEST.load(), swapped, Placement("cpu", "float32"))
    assert "tower" in caplog.text
    assert "pytorch_model.bin lies beside" in caplog.text
