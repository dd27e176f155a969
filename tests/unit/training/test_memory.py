"""How a shortage of memory is recognised and told."""

import pytest
import torch

from kuea_mllm.errors import UserError
from kuea_mllm.training.memory import is_out_of_memory, out_of_memory

ON_CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.65 GiB of "
    "which 1.02 GiB is free."
)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(ON_CUDA),
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    ],
)
def test_shortage_of_memory_is_recognised(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shape mismatch"), UserError("out of memory is mentioned."), KeyboardInterrupt()],
)
def test_other_errors_are_not_taken_for_one(error):
    assert not is_out_of_memory(error)


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        (ON_CUDA, " (2.50 GiB more were asked for)"),
        ("can't allocate memory: you tried to allocate 80 bytes.", " (80 bytes more were asked"),
        ("CUDA error: out of memory", "while tuning X."),
    ],
)
def test_line_says_how_much_was_asked_for_where_that_is_known(text, asked):
    told = out_of_memory(RuntimeError(text), "on cuda while tuning X", "Set less.")
    assert told.problem.startswith("out of memory on cuda while tuning X")
    assert asked in told.problem
    assert told.remedy == "Set less."
