"""Every shipped alignment recipe is complete, launches itself and states what the planner says."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from kuea_mllm.cli.align import align
from kuea_mllm.cli.plan import plan
from kuea_mllm.config.align import AlignRecipe
from kuea_mllm.config.recipes import list_shipped, load_recipe
from kuea_mllm.planning.models import known_architectures
from kuea_mllm.planning.text import header_estimate, recipes_markdown, reference_hardware

ROOT = Path(__file__).parents[3]
PLANNED = [recipe for recipe in list_shipped("align") if recipe.name != "align/miniworld"]
every_recipe = pytest.mark.parametrize("shipped", PLANNED, ids=lambda recipe: recipe.name)


def parse(function, command, name):
    """Parse a command line as the verb would, without running it."""
    app = typer.Typer()
    app.command()(function)
    arguments = shlex.split(command)
    assert arguments[:2] == ["kuea-mllm", name]
    return typer.main.get_command(app).make_context(name, arguments[2:]).params


def test_the_issue_s_recipes_are_there():
    names = {recipe.name.removeprefix("align/") for recipe in PLANNED}
    students = {"vit_b_16", "vit_l_14", "vit_l_14_336", "metaclip_l_14", "dfn_l_14"}
    fast = {"vit_b_16_fast", "vit_l_14_fast", "vit_l_14_336_fast", "vit_l_14_336_24gb"}
    assert students | fast | {"siglip_so400m_14", "vit_l_14_mlcd", "vit_l_14_336_mlcd"} <= names


@every_recipe
def test_header_has_purpose_command_cost_and_scores(shipped):
    header = shipped.text.splitlines()[:5]
    assert re.match(r"# \S.*\.$", header[0])
    assert header[1].startswith("# kuea-mllm align ")
    assert header[2].startswith("# Estimate: ")
    assert header[3].startswith("# Expected")
    assert header[4] == "kind: align"


@every_recipe
def test_launch_command_names_the_recipe_and_parses(shipped):
    command = shipped.text.splitlines()[1].removeprefix("# ")
    parameters = parse(align, command, "align")
    assert parameters["recipe"] == shipped.name
    assert parameters["images"]
    found = re.search(r"\((kuea-mllm plan [^)]*)\)", shipped.text.splitlines()[2])
    assert parse(plan, found[1], "plan")["recipe"] == shipped.name


@every_recipe
def test_header_states_what_the_planner_says(shipped):
    recipe = load_recipe(shipped.name, AlignRecipe)
    hardware = reference_hardware(shipped)
    line = header_estimate(shipped.name, recipe, *hardware)
    assert shipped.text.splitlines()[2] == f"# {line}"


@every_recipe
def test_models_are_known_without_weights(shipped):
    recipe = load_recipe(shipped.name, AlignRecipe).resolved()
    assert {recipe.student.model, recipe.teacher.model} <= known_architectures().keys()


@every_recipe
def test_kernel_constants_are_the_published_ones_or_marked(shipped):
    recipe = load_recipe(shipped.name, AlignRecipe)
    if not recipe.objective.kernel_weight or recipe.method == "projection":
        return
    is_published = (
        recipe.student.model == "openai/clip-vit-large-patch14" and "dinov2" in recipe.teacher.model
    )
    assert ("kuea-mllm calibrate" in shipped.text) != is_published


@pytest.mark.parametrize("name", ["vit_b_16", "vit_l_14", "vit_l_14_336"])
def test_fast_recipe_changes_only_how_it_is_computed(name):
    plain = load_recipe(f"align/{name}", AlignRecipe).model_dump()
    fast = load_recipe(f"align/{name}_fast", AlignRecipe).model_dump()
    different = {key for key in plain if plain[key] != fast[key]}
    assert different == {"runtime", "targets"}
    assert fast["runtime"]["precision"] == "bf16"
    assert fast["targets"]["cache"]


def test_table_of_the_documentation_is_current():
    document = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert recipes_markdown() in document, "renew it with `kuea-mllm plan --all`"
