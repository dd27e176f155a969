"""Kernel modules from their description in a recipe."""

from __future__ import annotations

import torch

from kuea_mllm.config.align import (
    CosineKernelConfig,
    KernelConfig,
    PolynomialKernelConfig,
    SumKernelConfig,
)
from kuea_mllm.kernels import CosineKernel, GaussianKernel, Kernel, PolynomialKernel, SumKernel


def build_kernel(config: KernelConfig, width: int, *, dtype: torch.dtype = torch.float32) -> Kernel:
    """Build the kernel module that a recipe describes.

    Args:
        config: What the recipe says; `trainable` left open means fixed.
        width: Width of the embeddings, from which an open `gamma` follows as `1 / width`.
        dtype: Precision in which the scalars are kept.
    """
    if isinstance(config, SumKernelConfig):
        return SumKernel(
            [
                (part.weight, build_kernel(part.kernel, width, dtype=dtype))
                for part in config.kernels
            ]
        )
    if isinstance(config, CosineKernelConfig):
        return CosineKernel()
    if isinstance(config, PolynomialKernelConfig):
        return PolynomialKernel(
            1.0 / width if config.gamma is None else config.gamma,
            config.coef0,
            degree=config.degree,
            trainable=bool(config.trainable),
            parametrisation=config.parametrisation,
            dtype=dtype,
        )
    return GaussianKernel(
        config.sigma,
        trainable=bool(config.trainable),
        parametrisation=config.parametrisation,
        dtype=dtype,
    )
