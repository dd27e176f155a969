"""`kuea-mllm plan`."""

import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from kuea_mllm.cli.plan import plan
from kuea_mllm.miniworld import ASSETS

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(plan)

TINY = [
    "--recipe=align/miniworld",
    f"--set=student.model={ASSETS / 'clip'}",
    f"--set=teacher.model={ASSETS / 'teacher'}",
]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_plan_of_local_directories_needs_only_their_config():
    answer = run(*TINY, "--json")
    assert answer.exit_code == 0, answer.stderr
    plan = json.loads(answer.stdout)
    assert plan["fits"]
    assert plan["fits_with"] == []
    assert plan["steps"] == 800
    assert sum(part["bytes"] for part in plan["memory"]) == plan["memory_bytes"]


def test_text_states_parts_total_hours_and_assumptions():
    answer = run(*TINY, "--processes=2")
    assert answer.exit_code == 0, answer.stderr
    for words in ("activations", "AdamW moments", "total", "hours", "images/s", "assumed"):
        assert words in answer.stdout


def test_settings_that_fit_are_named_where_a_recipe_does_not_fit():
    # 512 pictures of ViT-B-16 in fp32: 70 GiB of activations; counted with two depths only.
    answer = run(
        "--recipe=align/vit_b_16",
        "--set=optim.batch_size=512",
        "--card=rtx4090",
    )
    assert answer.exit_code == 0, answer.stderr
    assert "DOES NOT FIT" in answer.stdout
    assert "--set runtime.micro_batch_size=128" in answer.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--card=gtx1080"], "card 'gtx1080' is not known"),
        (["--processes=7"], "does not divide among 7"),
        (["--mfu=2"], "mfu 2.0"),
        (["--set=student.model=nobody/nothing"], "student.model"),
        (["--set=teacher.model=timm:vit_tiny"], "teacher.model"),
        (["--recipe=align/miniworld"], "'student.model' is not set"),
        (["--mean-tokens=9"], "--mean-tokens says nothing about a recipe of kind 'align'"),
        (["--recipe=llava15-7b-665k-4x4090", "--images=9"], "kind 'lora'"),
        (["--recipe=lora/miniworld"], "'model.path' is not set"),
        (["--recipe=lora/openflamingo3b", "--set=model.path=nobody/nothing"], "nobody/nothing"),
    ],
)
def test_wrong_request_is_one_clear_line(arguments, expected):
    answer = run(*arguments)
    assert answer.exit_code == 2
    assert expected in answer.stderr


def test_tuning_is_recognised_by_the_recipe_s_kind():
    answer = run("--recipe=lora/openflamingo3b", "--set=data.max_length=64", "--json")
    assert answer.exit_code == 0, answer.stderr
    plan = json.loads(answer.stdout)
    assert plan["trained"]["LoRA"] == 100_663_296
    assert plan["fits"]
    assert plan["choice"]["settings"] == []
    assert sum(part["bytes"] for part in plan["memory"]) == plan["memory_bytes"]


def test_module_loads_no_torch():
    code = "import sys, kuea_mllm.cli.plan; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
