"""Sweeps: every shipped one can start, and runs share one target cache."""

from __future__ import annotations

import pytest

from kuea_mllm.config.recipes import list_shipped, load_recipe
from kuea_mllm.config.sweep import SweepRecipe
from kuea_mllm.errors import RecipeError, UserError
from kuea_mllm.workflows.studies.trials import TrialPlace, _require_same_amounts
from kuea_mllm.workflows.sweep import plan_sweep

SHIPPED = [recipe.name for recipe in list_shipped("sweep")]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sweep_plans_valid_runs_that_share_a_cache(name, tmp_path):
    runs = plan_sweep(load_recipe(name, SweepRecipe), tmp_path, settings={"data.images": "x"})
    assert len(runs) >= 2
    assert {run.recipe.targets.directory for run in runs} == {str(tmp_path / "targets")}
    assert all(run.recipe.targets.cache for run in runs)


def test_impossible_combination_names_its_run(tmp_path):
    sweep = SweepRecipe(
        kind="sweep", recipe="align/vit_l_14", grid={"objective.kernel_weight": [0.5, 0]}
    )
    with pytest.raises(RecipeError, match="run kernel_weight=0: "):
        plan_sweep(sweep, tmp_path, settings={"data.images": "x"})


def test_study_begun_with_other_amounts_is_refused(tmp_path):
    _require_same_amounts(TrialPlace(tmp_path, tmp_path, questions=600))
    _require_same_amounts(TrialPlace(tmp_path, tmp_path, questions=600))
    with pytest.raises(UserError, match="questions 600, now it is 30"):
        _require_same_amounts(TrialPlace(tmp_path, tmp_path, questions=30))
