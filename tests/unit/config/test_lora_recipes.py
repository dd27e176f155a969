"""Every shipped tuning recipe is complete and states what the planner says."""

import re
from pathlib import Path

import pytest

from kuea_mllm.config.lora import LoraRecipe
from kuea_mllm.config.recipes import find_recipe, kind_of, list_shipped, load_recipe
from kuea_mllm.planning.text import reference_hardware
from kuea_mllm.planning.tuning_text import tuning_header, tuning_recipes_markdown

ROOT = Path(__file__).parents[3]
SHIPPED = list_shipped("lora")
every_recipe = pytest.mark.parametrize("shipped", SHIPPED, ids=lambda recipe: recipe.name)


def test_the_issue_s_recipes_are_there():
    names = {recipe.name.removeprefix("lora/") for recipe in SHIPPED}
    of_7b = {"4x4090", "released", "nf4_1x24gb", "packed"}
    others = {"llava15_13b_665k_nf4", "openflamingo3b", "miniworld"}
    assert {f"llava15_7b_665k_{name}" for name in of_7b} | others == names


@every_recipe
def test_header_has_purpose_command_cost_and_scores(shipped):
    header = shipped.text.splitlines()[:5]
    assert re.match(r"# \S.*\.$", header[0])
    assert header[1].startswith(f"# kuea-mllm lora --recipe {shipped.name} ")
    assert header[2].startswith("# Estimate: ")
    assert header[3].startswith("# Expected")
    assert header[4] == "kind: lora"
    assert load_recipe(shipped.name, LoraRecipe).kind == "lora"


def test_headers_and_documentation_state_what_the_planner_says():
    # In one test, so that one process counts each model once.
    for shipped in SHIPPED:
        hardware = reference_hardware(shipped)
        if hardware is None:
            assert shipped.name == "lora/miniworld"
            continue
        line = tuning_header(shipped.name, load_recipe(shipped.name, LoraRecipe), *hardware)
        assert shipped.text.splitlines()[2] == f"# {line}"
    document = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert tuning_recipes_markdown() in document, "renew it with `kuea-mllm plan --all`"


def test_paper_s_recipe_is_the_default_of_the_schema():
    paper = load_recipe("lora/llava15_7b_665k_4x4090", LoraRecipe).resolved(processes=4)
    plain = LoraRecipe.parse({"kind": "lora"}, origin="here").resolved(processes=4)
    different = paper.model_dump()
    different["model"]["path"] = None
    assert different == plain.model_dump()


@pytest.mark.parametrize("name", ["llava15-7b-665k-4x4090", "lora/llava15-7b_665k_4x4090"])
def test_hyphens_in_a_name_are_underscores(name):
    assert find_recipe(name).name == "lora/llava15_7b_665k_4x4090"
    assert kind_of(name) == "lora"


@pytest.mark.parametrize(
    ("name", "processes", "kind"),
    [("ddp_4gpu", 4, "MULTI_GPU"), ("multi_node", 8, "MULTI_GPU")],
)
def test_accelerate_reads_its_configuration(name, processes, kind):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "recipes" / "accelerate" / f"{name}.yaml"))
    assert config.num_processes == processes
    assert config.distributed_type == kind
    assert config.mixed_precision == "no"


def test_accelerate_configurations_are_no_recipes():
    assert not any(recipe.name.startswith("accelerate/") for recipe in list_shipped())
