"""What an alignment that runs out of memory is told to change."""

from types import SimpleNamespace

import pytest
import torch

from kuea_mllm.alignment.identity import is_free_key
from kuea_mllm.alignment.run import _named
from kuea_mllm.config.align import AlignRecipe
from kuea_mllm.config.recipes import load_recipe
from kuea_mllm.errors import EnvironmentFailure

ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has")


def told(**changes):
    settings = {key.replace("__", "."): value for key, value in changes.items()}
    recipe = load_recipe(
        "align/miniworld",
        AlignRecipe,
        settings={"student.model": "clip", "runtime.device": "cuda", **settings},
    )
    error = _named(ERROR, SimpleNamespace(recipe=recipe))
    assert isinstance(error, EnvironmentFailure)
    return recipe, error


@pytest.mark.parametrize(("micro", "smaller"), [(None, 24), (16, 8), (1, 1)])
def test_smaller_micro_batches_and_recomputation_are_named(micro, smaller):
    recipe, error = told(optim__batch_size=48, runtime__micro_batch_size=micro)
    assert error.problem == (
        "out of memory on cuda while aligning clip (2.50 GiB more were asked for)."
    )
    assert f"runtime.micro_batch_size={smaller} or runtime.gradient_check" in error.remedy
    # It says that an unfinished run may go on with them.
    for key in ("runtime.micro_batch_size", "runtime.gradient_checkpointing"):
        assert is_free_key(key, recipe)


def test_what_is_on_already_is_not_named():
    _, error = told(runtime__gradient_checkpointing=True)
    assert "gradient_checkpointing" not in error.remedy


def test_other_errors_stay_as_they_are():
    error = RuntimeError("shapes")
    assert _named(error, SimpleNamespace(recipe=None)) is error
