"""`kuea-mllm recipes` and the schemas behind it."""

import json

import pytest

from kuea_mllm.config.align import AlignRecipe
from kuea_mllm.config.recipes import (
    apply_overrides,
    list_shipped,
    load_recipe,
    recipe_to_yaml,
    validate_file,
)
from kuea_mllm.errors import RecipeError

SHIPPED = [recipe.name for recipe in list_shipped()]


def test_list_names_every_shipped_recipe(kuea):
    answer = kuea("recipes", "list", "--json")
    assert [recipe["name"] for recipe in json.loads(answer.out)] == SHIPPED
    assert len(SHIPPED) >= 5


@pytest.mark.parametrize("recipe", list_shipped(), ids=lambda recipe: recipe.name)
def test_shipped_recipe_is_valid_and_has_its_header(recipe):
    validate_file(recipe.path)
    header = recipe.text.splitlines()[:4]
    assert all(line.startswith("# ") for line in header), "purpose, command, cost, expected scores"
    assert header[1].startswith("# kuea-mllm ")


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith("align/")])
def test_resolved_recipe_survives_a_round_trip(name, tmp_path):
    recipe = load_recipe(name, AlignRecipe).resolved()
    file = tmp_path / "run.yaml"
    file.write_text(recipe_to_yaml(recipe))
    assert load_recipe(str(file), AlignRecipe).resolved() == recipe


def test_copy_then_validate(kuea, tmp_path):
    file = tmp_path / "mine.yaml"
    assert kuea("recipes", "copy", "align/vit_l_14", file).code == 0
    assert kuea("recipes", "validate", file).code == 0
    assert kuea("recipes", "copy", "align/vit_l_14", file).code == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kind: align\noptim: {steps: 1, steps: 2}", "stands twice"),
        ("kind: align\noptim: {steps: [", "not valid YAML"),
        ("- a list", "must be a mapping"),
        ("kind: alignn\n", "'kind'"),
        ("kind: align\noptim: {}", "optim.steps"),
        ("kind: align\noptim: {steps: 5}\nobjective: {student_kernel: {type: cubic}}", "cubic"),
        ("kind: align\noptim: {steps: 5, betas: [0.9]}", "optim.betas"),
    ],
)
def test_invalid_file_is_refused_with_the_key(kuea, tmp_path, text, expected):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    answer = kuea("recipes", "validate", file)
    assert answer.code == 2
    assert expected in answer.err


def test_recipe_of_another_kind_is_refused(kuea, align_arguments):
    answer = kuea(*align_arguments, "--recipe=eval/quick")
    assert answer.code == 2


def test_later_override_wins_and_input_is_untouched():
    content = {"optim": {"lr": 1}}
    assert apply_overrides(content, ["optim.lr=2", "optim.lr=3e-4"]) == {"optim": {"lr": "3e-4"}}
    assert content == {"optim": {"lr": 1}}


def test_scientific_notation_without_a_point_is_a_number():
    recipe = load_recipe("align/miniworld", AlignRecipe, overrides=["optim.lr=3e-4"])
    assert recipe.optim.lr == 3e-4


@pytest.mark.parametrize("override", ["optim.lr", "=3", "kind.deep=1"])
def test_malformed_override_is_refused(override):
    with pytest.raises(RecipeError, match=r"override|cannot set 'kind\.deep'"):
        load_recipe("align/miniworld", AlignRecipe, overrides=[override])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.steps=true", "neither true nor false"),
        ("optim.betas=[2, 3]", "optim.betas"),
        ("runtime.device=tpu", "runtime.device"),
    ],
)
def test_values_that_would_fail_late_fail_early(override, expected):
    with pytest.raises(RecipeError, match=expected):
        load_recipe("align/miniworld", AlignRecipe, overrides=[override])


@pytest.mark.parametrize("folder", ["2012", "my: pictures", "a #1", "~", "null"])
def test_paths_given_as_flags_are_never_read_as_yaml(kuea, align_arguments, folder):
    answer = kuea(*align_arguments, f"--images={folder}")
    assert answer.code == 2
    assert f"image folder {folder} does not exist" in answer.err
