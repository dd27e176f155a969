"""What `accelerate launch` may not change."""

import pytest

from kuea_mllm.errors import UserError
from kuea_mllm.training.foreign_settings import refuse_foreign_settings

# As accelerate 1.15 sets them where a configuration asks for one process on each of several GPUs.
PLAIN = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_USE_CPU": "True",
}


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    for name, value in PLAIN.items():
        monkeypatch.setenv(name, value)


def test_plain_configuration_passes():
    refuse_foreign_settings()


@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("ACCELERATE_USE_FSDP", "true", "runtime.sharding=fsdp"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "MULTI_GPU"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "MULTI_GPU"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "MULTI_GPU"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "mixed_precision: no"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "dynamo_backend: no"),
    ],
)
def test_configuration_that_changes_the_training_is_refused(monkeypatch, variable, value, remedy):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"{variable}={value}") as caught:
        refuse_foreign_settings()
    assert remedy in caught.value.remedy
