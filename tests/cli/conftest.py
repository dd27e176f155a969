"""A command line that is called in this process: fast, and the same code as the console script."""

from dataclasses import dataclass

import pytest
from typer.testing import CliRunner

from kuea_mllm.cli.main import app
from kuea_mllm.miniworld import ASSETS
from kuea_mllm.miniworld.images import write_images


@dataclass
class Answer:
    code: int
    out: str
    err: str


@pytest.fixture
def kuea(monkeypatch):
    # Left behind by an earlier --debug or --quiet in the same process.
    monkeypatch.delenv("KUEA_MLLM_DEBUG", raising=False)
    monkeypatch.delenv("KUEA_MLLM_QUIET", raising=False)

    def call(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        return Answer(result.exit_code, result.stdout, result.stderr)

    return call


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures") / "images"
    write_images(folder, split="train", count=64, seed=0)
    return folder


@pytest.fixture
def align_arguments(pictures, tmp_path):
    """A run that takes a second; a later option wins over an earlier one."""
    return [
        "align",
        "--recipe=align/miniworld",
        f"--student={ASSETS / 'clip'}",
        f"--teacher={ASSETS / 'teacher'}",
        f"--images={pictures}",
        f"--out={tmp_path / 'out'}",
        "--device=cpu",
        "--steps=3",
        "--batch-size=16",
        "--set=optim.warmup_steps=1",
        "--set=data.heldout_count=16",
    ]
