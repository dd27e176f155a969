"""Kernel modules are what the recipe says."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter

from kuea_mllm.alignment.kernels_from_recipe import build_kernel
from kuea_mllm.config.align import KernelConfig
from kuea_mllm.kernels import CosineKernel, GaussianKernel, PolynomialKernel, SumKernel

PARSER: TypeAdapter[KernelConfig] = TypeAdapter(KernelConfig)


@pytest.mark.parametrize(
    ("config", "constants", "parameters"),
    [
        ({"type": "polynomial"}, {"gamma": 0.125, "coef0": 1.0, "rho": 0.125}, []),
        (
            {"type": "polynomial", "gamma": 0.5, "coef0": 2.0, "trainable": True},
            {"gamma": 0.5, "coef0": 2.0, "rho": 0.25},
            ["log_rho"],
        ),
        (
            {"type": "polynomial", "trainable": True, "parametrisation": "direct"},
            {"gamma": 0.125, "coef0": 1.0, "rho": 0.125},
            ["gamma", "coef0"],
        ),
        ({"type": "gaussian", "sigma": 3.0}, {"sigma": 3.0}, []),
        ({"type": "gaussian", "sigma": 3.0, "trainable": True}, {"sigma": 3.0}, ["log_sigma"]),
        (
            {
                "type": "gaussian",
                "sigma": 3.0,
                "trainable": True,
                "parametrisation": "direct",
            },
            {"sigma": 3.0},
            ["sigma"],
        ),
        ({"type": "cosine"}, {}, []),
    ],
)
def test_kernel_has_the_constants_and_parameters_of_its_recipe(config, constants, parameters):
    kernel = build_kernel(PARSER.validate_python(config), 8, dtype=torch.float64)
    assert kernel.constants() == pytest.approx(constants)
    assert [name for name, _ in kernel.named_parameters()] == parameters


def test_degree_and_dtype_are_passed_on():
    config = PARSER.validate_python({"type": "polynomial", "degree": 5})
    kernel = build_kernel(config, 3)
    assert isinstance(kernel, PolynomialKernel)
    assert kernel.degree == 5
    assert kernel.gamma.dtype == torch.float32
    assert build_kernel(config, 3, dtype=torch.float64).gamma.dtype == torch.float64


def test_sum_keeps_weights_and_order():
    config = {
        "type": "sum",
        "kernels": [
            {"weight": 3.0, "kernel": {"type": "gaussian", "sigma": 2.0}},
            {"kernel": {"type": "polynomial"}},
            {"weight": 4.0, "kernel": {"type": "cosine"}},
        ],
    }
    kernel = build_kernel(PARSER.validate_python(config), 4)
    assert isinstance(kernel, SumKernel)
    assert kernel.weights == (0.375, 0.125, 0.5)
    assert [type(part) for part in kernel.kernels] == [
        GaussianKernel,
        PolynomialKernel,
        CosineKernel,
    ]
    assert kernel.constants() == {"0_sigma": 2.0, "1_gamma": 0.25, "1_coef0": 1.0, "1_rho": 0.25}
