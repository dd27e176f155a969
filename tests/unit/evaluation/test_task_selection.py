from __future__ import annotations

from pathlib import Path

import pytest

from kuea_mllm.errors import EvaluationError
from kuea_mllm.evaluation.tasks import nearest_names, resolve_tasks


def write_task(folder: Path, name: str, extra: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(
        f"task: {name}\noutput_type: generate_until\ndoc_to_visual: !function utils.images\n{extra}"
    )
    return path


def test_stock_names_files_and_directories_are_told_apart(tmp_path: Path) -> None:
    first, second = write_task(tmp_path / "own", "one"), write_task(tmp_path / "own/deep", "two")
    (tmp_path / "own" / "group.yaml").write_text("group: both\ntask: [one, two]\n")
    third = write_task(tmp_path, "three")
    selection = resolve_tasks(["pope", str(tmp_path / "own"), str(third)])
    assert selection.stock == ("pope",)
    assert selection.files == {"one": first, "two": second, "three": third}


def test_bare_directory_name_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_task(tmp_path / "own", "one")
    monkeypatch.chdir(tmp_path)
    assert list(resolve_tasks(["own"]).files) == ["one"]


def test_two_sources_of_a_name_are_refused(tmp_path: Path) -> None:
    write_task(tmp_path / "a", "pope")
    write_task(tmp_path / "b", "pope")
    with pytest.raises(
        EvaluationError, match=r"'pope' has two sources: .*a/pope.yaml and .*b/pope"
    ):
        resolve_tasks([str(tmp_path / "a"), str(tmp_path / "b")])
    with pytest.raises(EvaluationError, match="'pope' has two sources: lmms-eval and"):
        resolve_tasks(["pope", str(tmp_path / "a")])


def test_the_same_source_twice_is_refused(tmp_path: Path) -> None:
    path = write_task(tmp_path, "one")
    with pytest.raises(EvaluationError, match="given twice"):
        resolve_tasks([str(path), str(tmp_path)])
    with pytest.raises(EvaluationError, match="given twice"):
        resolve_tasks(["pope", "pope"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("task: [a, b]\n", "no key `task`"),
        ("- 1\n", "holds no keys"),
        ("task: {\n", "not valid YAML"),
        ("task: one\nclass: !function mod.Task\n", "Python class"),
        (
            "task: one\ndataset_path: parquet\ndataset_kwargs: {data_files: {test: no.parquet}}\n",
            "names the data file no.parquet, which does not exist",
        ),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "task.yaml"
    path.write_text(content)
    with pytest.raises(EvaluationError, match=message) as caught:
        resolve_tasks([str(path)])
    assert str(path) in str(caught.value)


def test_missing_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no task given"):
        resolve_tasks([])
    with pytest.raises(EvaluationError, match=r"gone.yaml does not exist"):
        resolve_tasks([str(tmp_path / "gone.yaml")])
    with pytest.raises(EvaluationError, match=r"no \*.yaml in it"):
        resolve_tasks([str(tmp_path)])
    (tmp_path / "template.yaml").write_text("metric_list: []\n")
    with pytest.raises(EvaluationError, match="none of its 1 YAML files"):
        resolve_tasks([str(tmp_path)])


def test_data_files_are_looked_for_beside_the_task(tmp_path: Path) -> None:
    extra = "dataset_path: json\ndataset_kwargs: {data_files: {test: ../d.json, x: 'hub://a/*'}}\n"
    write_task(tmp_path / "tasks", "one", extra)
    (tmp_path / "d.json").write_text("{}")
    assert list(resolve_tasks([str(tmp_path / "tasks")]).files) == ["one"]


def test_nearest_names_help_with_typing_errors() -> None:
    assert nearest_names("popee", ["pope", "vqav2_val", "mmvp"]) == ["pope"]
    assert nearest_names("vqa", ["pope", "vqav2_val", "mmvp"])[0] == "vqav2_val"
    assert nearest_names("zzzz", ["pope"]) == []
