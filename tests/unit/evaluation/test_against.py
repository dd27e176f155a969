"""`eval --against`: halves that are finished already."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
from compare_data import edit_summary, scores_of, write_results

from kuea_mllm.errors import UserError
from kuea_mllm.manifest import library_versions
from kuea_mllm.workflows.against import evaluate_pair

RECIPE = "max_failures: 0\n"


def run(model: Path, out: Path, _going_on: bool) -> dict[str, object]:
    write_results(out, {"pope": scores_of(30, 10)})
    return {"model": str(model)}


def go_on(out: Path, baseline: str) -> None:
    models = {"baseline": Path(baseline), "candidate": Path("vendor/new")}
    evaluate_pair(models, out, run, recipe=RECIPE, device="cpu", resume=True, restart=False)


def test_model_of_a_backend_is_known_by_its_name(tmp_path: Path) -> None:
    half = write_results(tmp_path / "out" / "baseline", {"pope": scores_of(30, 20)})
    (half / "run.yaml").write_text(RECIPE)
    model = {"path": "vendor/old", "name": "vendor/old", "files_fingerprint": None}
    versions = {**library_versions(), "datasets": version("datasets")}
    edit_summary(
        half, model=model | {"adapter": None, "tower_fingerprint": None}, versions=versions
    )
    with pytest.raises(UserError, match="vendor/other is not that of the finished baseline"):
        go_on(tmp_path / "out", "vendor/other")
    go_on(tmp_path / "out", "vendor/old")
    assert (tmp_path / "out" / "comparison.json").is_file()
