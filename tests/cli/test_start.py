"""Starting the command line: light imports, completion, help of every verb."""

import subprocess
import sys

import pytest
import typer

from kuea_mllm import __version__
from kuea_mllm.cli.common import verb

HEAVY = ["torch", "transformers", "lmms_eval", "numpy", "matplotlib", "sklearn", "open_clip"]


def run(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("module", ["kuea_mllm", "kuea_mllm.cli.main", "kuea_mllm.config.recipes"])
def test_import_loads_nothing_heavy(module):
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert run("-c", code).stdout.strip() == "[]"


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["recipes", "list"], ["recipes", "show", "align/vit_l_14"], ["align", "--help"]],
    ids=" ".join,
)
def test_light_commands_load_nothing_heavy(arguments):
    code = (
        "import sys\nfrom kuea_mllm.cli.main import run\n"
        f"sys.argv = ['kuea-mllm', *{arguments!r}]\n"
        "try:\n    run()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    assert run("-c", code).stderr.strip() == "[]"


def test_version(kuea):
    assert kuea("--version").out.strip() == f"kuea-mllm {__version__}"


@pytest.mark.parametrize(
    "verb",
    [
        *("quickstart", "doctor", "plan", "calibrate", "pack", "align", "sweep", "swap", "eval"),
        *("verify", "judge", "compare", "convert", "push", "recipes", "cache", "world"),
    ],
)
def test_every_verb_has_help(kuea, verb):
    answer = kuea(verb, "--help")
    assert answer.code == 0
    assert "Usage" in answer.out


def test_mistyped_verb_names_the_nearest(kuea):
    answer = kuea("aling")
    assert answer.code == 2
    assert "align" in answer.err


def test_shell_completion_script_is_printed():
    # Typer looks at the parent process for the shell, so it is named here.
    code = "from kuea_mllm.cli.main import run; run()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"_KUEA_MLLM_COMPLETE": "source_bash", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "complete" in done.stdout
    assert done.returncode == 0


def test_reader_who_has_seen_enough_is_no_error(tmp_path, monkeypatch, capfd):
    @verb
    def print_much():
        raise BrokenPipeError(32, "Broken pipe")

    with (tmp_path / "pipe").open("w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(typer.Exit) as ended:
            print_much()
        # Nothing is left that could fail again when Python ends.
        pipe.write("more")
    assert ended.value.exit_code == 1
    assert capfd.readouterr().err == ""
    assert (tmp_path / "pipe").read_text() == ""
