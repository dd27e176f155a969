"""Planning and tabulating sweeps; alignments themselves are replaced by a stand-in."""

import json

import pytest

from kuea_mllm.config.recipes import list_shipped, read_yaml
from kuea_mllm.config.sweep import SweepRecipe, name_run
from kuea_mllm.errors import OutputError, RecipeError, TrainingDiverged
from kuea_mllm.reporting.sweep import sweep_figure
from kuea_mllm.workflows.sweep import plan_sweep, run_sweep, sweep_markdown

MODELS = {"student.model": "s", "teacher.model": "t", "data.images": "i"}


def make(**grid):
    keys = {key.replace("__", "."): values for key, values in grid.items()}
    return SweepRecipe(kind="sweep", recipe="align/miniworld", grid=keys)


def plan(out, sweep, **settings):
    return plan_sweep(sweep, out, settings={**MODELS, **settings})


@pytest.fixture
def aligned(monkeypatch):
    """Runs that finish at once; a weight of 13 diverges."""
    calls = []

    def run(recipe, out, *, progress, finish, resume):
        calls.append((out.name, resume))
        weight = recipe.objective.kernel_weight
        if weight == 13:
            raise TrainingDiverged("loss_kernel is nan at step 3.", "Lower optim.lr.")
        (out / "tower").mkdir(parents=True)
        measured = {"heldout_kernel_gap": weight, "heldout_cka_teacher": 0.5}
        manifest = {"heldout": {"before": {"heldout_kernel_gap": 9.0}, "after": measured}}
        (out / "tower" / "kuea.json").write_text(json.dumps(manifest))

    monkeypatch.setattr("kuea_mllm.alignment.run.run_alignment", run)
    return calls


def test_every_combination_is_one_run_with_its_keys(tmp_path):
    runs = plan(tmp_path, make(objective__kernel_weight=[1, 2], optim__steps=[100, 200, 300]))
    assert len(runs) == 6
    assert runs[1].name == "kernel_weight=1,steps=200"
    assert runs[1].recipe.objective.kernel_weight == 1
    assert runs[1].recipe.optim.steps == 200


def test_epochs_in_the_grid_replace_the_steps_of_the_recipe(tmp_path):
    [run] = plan(tmp_path, make(optim__epochs=[2.0]), **{"optim.warmup_steps": 0})
    assert (run.recipe.optim.epochs, run.recipe.optim.steps) == (2.0, None)


def test_runs_share_a_target_cache_unless_a_transform_is_random(tmp_path):
    plain, random = plan(tmp_path, make(data__augment=["none", "flip"]))
    assert plain.recipe.targets.cache
    assert plain.recipe.targets.directory == str(tmp_path / "targets")
    assert not random.recipe.targets.cache


def test_wrong_value_is_named_with_its_run_before_anything_starts(tmp_path):
    with pytest.raises(RecipeError, match=r"run lr=-1: .*optim\.lr"):
        plan(tmp_path, make(optim__lr=[1e-3, -1]))


def test_repeated_value_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="one name"):
        plan(tmp_path, make(optim__lr=[1e-3, 0.001]))


def test_kernels_give_names_that_are_folders():
    name = name_run({"objective.student_kernel": {"type": "gaussian", "sigma": 8.7}})
    assert name == "student_kernel=gaussian-8.7"


def test_table_holds_all_runs_and_a_diverged_one_does_not_stop_it(tmp_path, aligned):
    sweep = make(objective__kernel_weight=[1, 13, 2])
    out = tmp_path / "sweep"
    record = run_sweep(plan(out, sweep), out, sweep=sweep, progress=False)
    assert [row["error"] is None for row in record["runs"]] == [True, False, True]
    assert record["complete"]
    assert json.loads((out / "sweep.json").read_text()) == record
    table = sweep_markdown(record)
    assert "| kernel_weight=2 | 2 | 0.5 |" in table
    assert "loss_kernel is nan" in table


def test_finished_runs_are_not_repeated_and_an_interrupted_one_is_resumed(tmp_path, aligned):
    sweep, out = make(objective__kernel_weight=[1, 2]), tmp_path / "sweep"
    run_sweep(plan(out, sweep), out, sweep=sweep, progress=False)
    (out / "runs" / "kernel_weight=3.unfinished").mkdir()
    longer = make(objective__kernel_weight=[1, 2, 3])
    run_sweep(plan(out, longer), out, sweep=longer, progress=False)
    assert aligned == [
        ("kernel_weight=1", False),
        ("kernel_weight=2", False),
        ("kernel_weight=3", True),
    ]


def test_folder_of_another_sweep_is_refused(tmp_path, aligned):
    sweep, out = make(objective__kernel_weight=[1]), tmp_path / "sweep"
    run_sweep(plan(out, sweep), out, sweep=sweep, progress=False)
    with pytest.raises(OutputError, match="kernel_weight=1 has another recipe"):
        run_sweep(plan(out, sweep, **{"optim.lr": 0.5}), out, sweep=sweep, progress=False)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(OutputError, match="holds no sweep"):
        run_sweep(plan(other, sweep), other, sweep=sweep, progress=False)


def test_figure_has_a_panel_for_each_measurement(tmp_path, aligned):
    sweep, out = make(objective__kernel_weight=[1, 2, 50], optim__lr=[0.1, 0.2]), tmp_path / "s"
    record = run_sweep(plan(out, sweep), out, sweep=sweep, progress=False)
    figure = sweep_figure(record)
    assert len(figure.axes) == 2
    assert figure.axes[0].get_xscale() == "log"
    lines = [line for line in figure.axes[0].lines if line.get_marker() != "None"]
    assert len({line.get_marker() for line in lines}) == len(lines)
    assert sorted(line.get_label() for line in lines) == ["0.1", "0.2"]


@pytest.mark.parametrize("recipe", list_shipped("sweep"), ids=lambda recipe: recipe.name)
def test_shipped_sweep_plans_all_of_its_runs(recipe, tmp_path):
    sweep = SweepRecipe.parse(read_yaml(recipe.path), origin=recipe.name)
    runs = plan_sweep(sweep, tmp_path, settings={"data.images": "images"})
    assert len(runs) == len(sweep.combinations()) > 1
    assert f"--recipe {recipe.name} " in recipe.text.splitlines()[1]
