"""Every command of the pages about encoders can be given: recipes, keys and options exist."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from kuea_mllm.cli.main import app
from kuea_mllm.config.align import AlignRecipe
from kuea_mllm.config.lora import LoraRecipe
from kuea_mllm.config.recipes import load_recipe
from kuea_mllm.config.sweep import SweepRecipe

DOCS = Path(__file__).parents[2] / "docs"


def commands_of(page: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("kuea-mllm ")]


BASELINES = commands_of("baselines.md")
COMMANDS = [*BASELINES, *commands_of("probing.md"), *commands_of("look.md")]
KINDS = {"align": AlignRecipe, "lora": LoraRecipe, "sweep": SweepRecipe}
# A row of a table that has no command would go unseen otherwise.
NEEDED = (
    *("_projection", "_feature", "vit_b_16", "vit_l_14_336", "OpenAI-ViT-L-14-336.pth"),
    *("siglip", "dfn", "metaclip", "_mlcd", "_radio", "llava_mof", "data_fraction"),
)


def values_of(words: list[str], option: str) -> list[str]:
    return [words[i + 1] for i, word in enumerate(words[:-1]) if word == option]


@pytest.mark.parametrize("command", COMMANDS)
def test_options_of_the_command_exist(command):
    verb, *words = shlex.split(command)[1:]
    group: typer.core.TyperGroup = typer.main.get_command(app)
    known = {name for parameter in group.commands[verb].params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("command", [c for c in COMMANDS if "--recipe" in c])
def test_recipe_of_the_command_takes_its_keys(command):
    verb, *words = shlex.split(command)[1:]
    student = values_of(words, "--student")
    settings = {"student.model": student[0]} if student else {}
    (recipe,) = values_of(words, "--recipe")
    loaded = load_recipe(
        recipe, KINDS[verb], settings=settings, overrides=values_of(words, "--set")
    )
    assert loaded.kind == verb


def test_every_system_of_the_tables_has_a_command():
    text = "\n".join(BASELINES)
    assert [name for name in NEEDED if name not in text] == []


def test_help_of_every_verb_is_there():
    for verb in {shlex.split(command)[1] for command in COMMANDS}:
        assert CliRunner().invoke(app, [verb, "--help"]).exit_code == 0
