"""`kuea-mllm world flamingo` and the last step of `quickstart --full`, with a brief training."""

import functools
import json
from types import SimpleNamespace

import pytest
import torch

from kuea_mllm.miniworld import ASSETS, train_flamingo
from kuea_mllm.miniworld.flamingo import TASKS
from kuea_mllm.miniworld.training import Schedule
from kuea_mllm.towers.reading.load import load_tower
from kuea_mllm.towers.writing.save import save_tower


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    schedule = Schedule(steps=3, lr=1e-3, warmup_steps=1)
    whole = train_flamingo.train_flamingo
    short = functools.partial(whole, pictures=48, schedule=schedule)
    monkeypatch.setattr(train_flamingo, "train_flamingo", short)


def test_flamingo_of_a_world_is_a_model_to_swap_into(kuea, tmp_path):
    out = tmp_path / "flamingo"
    answer = kuea("world", "flamingo", f"--out={out}", "--questions=2", "--json")
    assert answer.code == 0, answer.err
    told = json.loads(answer.out)
    assert set(told["scores"]) == {"0", "4"}
    assert set(told["scores"]["0"]) == {*TASKS, "average"}
    assert json.loads((out / "world.json").read_text())["scores"] == told["scores"]
    named = kuea("verify", out, f"--tower={ASSETS / 'clip'}", "--json")
    assert named.code == 0, named.out
    assert json.loads(named.out)["adapter"] == "openflamingo"


def test_table_is_printed_for_people(kuea, tmp_path):
    answer = kuea("world", "flamingo", f"--out={tmp_path / 'out'}", "--questions=1")
    assert answer.code == 0, answer.err
    for text in ("shots", "average", f"flamingo: {tmp_path / 'out'}".replace("\n", "")):
        assert text in answer.out


def test_world_without_a_clip_is_refused(kuea, tmp_path):
    answer = kuea("world", "flamingo", f"--out={tmp_path / 'out'}", f"--world={tmp_path}")
    assert answer.code == 2
    assert "clip is not a model directory" in answer.err
    assert not list(tmp_path.iterdir())


def test_full_quickstart_compares_the_towers_in_a_flamingo(tmp_path):
    from kuea_mllm.reporting.shots import shots_section
    from kuea_mllm.workflows.quickstart import _compare_in_flamingo

    tower = load_tower(ASSETS / "clip")
    with torch.no_grad():
        for parameter in tower.model.parameters():
            parameter.mul_(1.01)
    save_tower(tower, tmp_path / "tower", manifest={})
    record = _compare_in_flamingo(
        tmp_path,
        SimpleNamespace(tower=tmp_path / "tower"),
        questions=2,
        seed=0,
        show_progress=False,
    )
    assert record == json.loads((tmp_path / "flamingo.json").read_text())
    assert record["fingerprints"]["aligned"] == tower.fingerprint
    assert record["fingerprints"]["original"] == load_tower(ASSETS / "clip").fingerprint
    table = shots_section(record).blocks[-1]
    assert [row[1] for row in table.rows] == ["original", "aligned", "difference"] * 2
