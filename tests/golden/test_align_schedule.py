"""The learning rate of every update, in the usual and in the released order."""

import pytest
import torch

from kuea_mllm.alignment.schedule import cosine_with_warmup, lr_multiplier


@pytest.fixture(scope="module")
def golden(align_golden):
    return align_golden("schedule.safetensors")


def cases(golden):
    for name, parameters in golden.hyper_parameters.items():
        yield name, parameters["base_lr"], parameters["warmup"], parameters["total_steps"]


def test_schedule_function_equals_golden(golden):
    for name, base_lr, warmup, total in cases(golden):
        ours = [
            base_lr * cosine_with_warmup(int(step), warmup_steps=warmup, total_steps=total)
            for step in golden[f"{name}.f_step"]
        ]
        expected = golden[f"{name}.f_value"]
        torch.testing.assert_close(
            torch.tensor(ours, dtype=torch.float64), expected, rtol=1e-12, atol=1e-24, msg=name
        )


@pytest.mark.parametrize("order", ["released", "conventional"])
def test_rate_of_each_update_equals_golden(golden, order):
    for name, base_lr, warmup, total in cases(golden):
        multiplier = lr_multiplier(
            warmup_steps=warmup,
            total_steps=total,
            first_update_at_full_lr=order == "released",
        )
        ours = [base_lr * multiplier(int(update) - 1) for update in golden[f"{name}.update_index"]]
        torch.testing.assert_close(
            torch.tensor(ours, dtype=torch.float64),
            golden[f"{name}.lr_used_{order}"],
            rtol=1e-12,
            atol=1e-24,
            msg=name,
        )
